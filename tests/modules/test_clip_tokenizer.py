"""CLIP's tokens against transformers' tokenizer and open_clip's, both from the same merges."""

from __future__ import annotations

import json
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ldm.modules.encoders.clip_tokenizer import END, START, clip_tokenizer, read_merges, vocabulary
from ldm.modules.encoders.modules import FrozenCLIPEmbedder

WORDS = [
    "a photo of",
    "sks",
    "dog",
    "DON'T",
    "it's",
    "we'll",
    "2024",
    "café",
    "naïve",
    "日本語",
    "🐕‍🦺",
    "...",
    "!!",
    "ß",
    "İ",
]
# Places that a later Unicode fills are letters to one regular-expression library and not yet to another; U+0345 is
# one to open_clip's pattern alone.
ASSIGNED = [chr(n) for n in range(0x110000) if unicodedata.category(chr(n)) not in ("Cn", "Cs") and n != 0x345]


def texts(characters: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Arbitrary strings, and words in a row with a few arbitrary characters."""
    words = st.lists(st.sampled_from(WORDS) | st.text(characters, max_size=4)).map(" ".join)
    return st.text(characters) | words


ANY = texts(st.characters(exclude_categories=("Cs",)))


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' CLIPTokenizer from a vocabulary's files."""
    from transformers import CLIPTokenizer

    folder: Path = tmp_path_factory.mktemp("clip")
    merges = read_merges()
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges)))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


@lru_cache(maxsize=1)
def independent() -> Any:
    """open_clip's tokenizer, which is written in Python, with Stable Diffusion v1's normalisation."""
    from open_clip.tokenizer import SimpleTokenizer

    def normalise(text: str) -> str:
        spaced = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
        return "".join(character.lower() for character in spaced)

    tokenizer = SimpleTokenizer()
    tokenizer.clean_fn = normalise
    return tokenizer


@pytest.fixture(scope="module")
def encoder() -> FrozenCLIPEmbedder:
    """One with room for ten tokens."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return FrozenCLIPEmbedder(max_length=10, architecture=sizes)


def test_known_tokens() -> None:
    assert clip_tokenizer().encode("a photo of a sks dog") == [320, 1125, 539, 320, 48136, 1929]
    assert (clip_tokenizer().start, clip_tokenizer().end) == (49406, 49407)


def test_vocabulary_is_the_published_one() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    published = SimpleTokenizer().encoder
    ours = vocabulary(read_merges())
    assert list(ours.values()) == list(range(49408))
    assert {k: v for k, v in ours.items() if v < 49406} == {k: v for k, v in published.items() if v < 49406}


@settings(deadline=None)
@given(text=ANY)
def test_agrees_with_transformers(peer: Any, text: str) -> None:
    assert clip_tokenizer().encode(text) == peer(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None)
@given(text=texts(st.sampled_from(ASSIGNED)).filter(lambda text: "<|" not in text))
def test_agrees_with_open_clip(text: str) -> None:
    assert clip_tokenizer().encode(text) == independent().encode(text)


@pytest.mark.filterwarnings("ignore:the prompt is longer")
@settings(deadline=None)
@given(text=ANY)
def test_prompts_are_cut_and_padded_as_by_transformers(peer: Any, encoder: FrozenCLIPEmbedder, text: str) -> None:
    theirs = peer([text], max_length=10, truncation=True, padding="max_length")["input_ids"]
    assert encoder.tokenize([text]).tolist() == theirs


@settings(deadline=None)
@given(text=ANY, room=st.integers(0, 12))
@example(text="00Â\x1f", room=4)
def test_split_keeps_what_fits_and_gives_back_the_rest(text: str, room: int) -> None:
    tokenizer = clip_tokenizer()
    numbers, rest = tokenizer.split(text, room)
    assert numbers == tokenizer.encode(text)[:room]
    assert rest in text and bool(rest) == (len(tokenizer.encode(text)) > room)


def test_special_tokens_in_a_text_are_themselves(peer: Any) -> None:
    text = f"a dog{END} {START}cat"
    assert clip_tokenizer().encode(text) == peer(text, add_special_tokens=False)["input_ids"]
    assert {49406, 49407} <= set(clip_tokenizer().encode(text))


def test_bytes_that_are_no_text_are_question_marks() -> None:
    assert clip_tokenizer().encode("a\udc80b") == clip_tokenizer().encode("a?b")


def test_decode_gives_the_text_back() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.decode(tokenizer.encode("A  Photo, of CAFÉ 🐕")) == "a photo , of café 🐕"
