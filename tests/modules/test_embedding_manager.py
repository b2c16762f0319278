"""New words of a text encoder: what they may be called, and files that they start as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from ldm.exchange import embeddings
from ldm.modules.embedding_manager import EmbeddingManager
from tests.goldens.fill import data
from tests.modules.test_encoders import small

VECTORS = data("toy", (2, 32))


def manager(*words: str) -> EmbeddingManager:
    return EmbeddingManager(small(), words)


@pytest.mark.parametrize("word", ["train", "half", "type", "copy", "items", "values", "training", "forward"])
def test_a_word_called_like_an_attribute_of_modules_is_refused_and_changes_nothing(word: str) -> None:
    words = manager("<toy>")
    with pytest.raises(UserError, match=f"'{word}' cannot be a new word"):
        words.add(word, VECTORS)
    assert words.words == ["<toy>"]
    words.add("<cat>", VECTORS)
    assert list(words.state_dict()) == ["string_to_param_dict.<toy>", "string_to_param_dict.<cat>"]
    assert words.mentions("a <cat>") and not words.mentions(f"a {word}")


def test_a_single_word_starts_as_that_of_a_file_whatever_its_name(tmp_path: Path) -> None:
    original = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": VECTORS}}
    torch.save(original, tmp_path / "embeddings.pt")
    embeddings.write({"<cat>": VECTORS}, tmp_path / "cat.safetensors")
    for name in ("embeddings.pt", "cat.safetensors"):
        words = manager("<toy>")
        words.load(tmp_path / name)
        assert words.words == ["<toy>"] and torch.equal(words.string_to_param_dict["<toy>"], VECTORS)


def test_words_of_a_file_are_taken_by_their_names(tmp_path: Path) -> None:
    embeddings.write({"<cat>": VECTORS, "<toy>": VECTORS + 1}, tmp_path / "two.safetensors")
    words = manager("<toy>", "<dog>")
    words.load(tmp_path / "two.safetensors")
    assert torch.equal(words.string_to_param_dict["<toy>"], VECTORS + 1)
    assert not words.string_to_param_dict["<dog>"].any()


@pytest.mark.parametrize("names", [("<dog>",), ("<dog>", "<fox>")])
def test_a_file_without_any_of_the_words_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    embeddings.write({"<cat>": VECTORS, "<toy>": VECTORS + 1}, tmp_path / "two.safetensors")
    words = manager(*names)
    with pytest.raises(UserError, match=f"has vectors of <cat>, <toy>, and the new words are {', '.join(names)};"):
        words.load(tmp_path / "two.safetensors")
    assert words.words == list(names)
