"""Weights in prompts and clip-skip, against transformers' own hidden states."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ldm.errors import UserError
from ldm.modules.encoders.modules import ClassEmbedder, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.weighting import encode_weighted, parse, stopped_early
from tests.goldens.fill import fill

CLIP = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
OPEN_CLIP = {"embed_dim": 24, "text_cfg": {"width": 32, "heads": 4, "layers": 3}}


@pytest.fixture(scope="module", params=["CLIP", "OpenCLIP"])
def encoder(request: pytest.FixtureRequest) -> torch.nn.Module:
    if request.param == "CLIP":
        return fill(FrozenCLIPEmbedder(architecture=CLIP))
    return fill(FrozenOpenCLIPEmbedder(architecture=OPEN_CLIP))


@pytest.mark.parametrize(
    "prompt, pieces",
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (red:1.5) cat", [("a ", 1.0), ("red", 1.5), (" cat", 1.0)]),
        ("(cat)", [("cat", 1.1)]),
        ("((cat))", [("cat", 1.21)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("(a [b] c)", [("a ", 1.1), ("b", 1.0), (" c", 1.1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        (r"\(cat\) \[a\] \\", [(r"(cat) [a] " + "\\", 1.0)]),
        ("(cat : 1.3 )", [("cat ", 1.3)]),
        ("(open", [("open", 1.1)]),
        ("[open", [("open", 1 / 1.1)]),
        ("closed) a] 12:30 a:1.2)", [("closed) a] 12:30 a:1.2)", 1.0)]),
        ("(none:0)", [("none", 0.0)]),
        ("(less:-0.5)", [("less", -0.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("", []),
        ("()", []),
    ],
)
def test_syntax(prompt: str, pieces: list[tuple[str, float]]) -> None:
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@given(st.text("ab ()[]:\\1.2"))
@example(":111)")
@example("a) b] c:111)")
def test_every_string_has_a_meaning(prompt: str) -> None:
    assume(not re.search(r"\(.*:\s*-?[\d.]{3,}\)", prompt))  # a weight beyond 100 in brackets is an error
    text = "".join(piece for piece, _ in parse(prompt))
    assert set(text) <= set(prompt) and len(text) <= len(prompt)
    if not set("()[]\\") & set(prompt):
        assert text == prompt


LETTERS = st.text("ab \\()[]", min_size=1, max_size=4)
WEIGHTS = st.sampled_from([None, 0.5, 1.0, 1.25, -2.0])  # None: brackets without a number


def trees(depth: int) -> st.SearchStrategy[list]:
    """Prompts as lists of (what, bracket, weight): text, or such a list in brackets."""
    text = st.tuples(LETTERS, st.just(""), st.none())
    if depth == 0:
        return st.lists(text, max_size=2)
    inner = trees(depth - 1)
    round_ones, square_ones = st.tuples(inner, st.just("("), WEIGHTS), st.tuples(inner, st.just("["), st.none())
    return st.lists(text | round_ones | square_ones, max_size=3)


def written(tree: list) -> str:
    """The prompt of a tree."""
    parts = []
    for what, bracket, weight in tree:
        if not bracket:
            parts.append("".join(f"\\{c}" if c in "\\()[]" else c for c in what))
        elif bracket == "[":
            parts.append(f"[{written(what)}]")
        else:
            parts.append(f"({written(what)})" if weight is None else f"({written(what)}:{weight})")
    return "".join(parts)


def meant(tree: list, factor: float = 1.0) -> list[tuple[str, float]]:
    """Every character of a tree's text with its weight."""
    pairs = []
    for what, bracket, weight in tree:
        if bracket:
            own = 1 / 1.1 if bracket == "[" else 1.1 if weight is None else weight
            pairs += meant(what, factor * own)
        else:
            pairs += [(character, factor) for character in what]
    return pairs


@given(trees(2))
def test_nested_weights_multiply(tree: list) -> None:
    found = [(character, weight) for text, weight in parse(written(tree)) for character in text]
    expected = meant(tree)
    assert [character for character, _ in found] == [character for character, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_absurd_weights_are_refused() -> None:
    with pytest.raises(UserError, match="beyond 100"):
        parse("(cat:" + "9" * 400 + ")")


@torch.no_grad()
def test_without_weights_nothing_changes(encoder: torch.nn.Module) -> None:
    prompts = ["a photo of a sks dog, 2024", "", "café 🐕"]
    assert torch.equal(encode_weighted(encoder, prompts), encoder(prompts))


@torch.no_grad()
def test_a_weight_scales_the_states_of_its_tokens_alone(encoder: torch.nn.Module) -> None:
    plain, weighted = encoder(["a red cat"]), encode_weighted(encoder, ["a (red:1.5) cat"])
    factors = torch.ones(77)
    factors[2] = 1.5  # start, a, red
    torch.testing.assert_close(weighted, plain * factors[:, None], atol=1e-6, rtol=1e-6)
    both = encode_weighted(encoder, ["a [[cat]] there", "a (red:1.5) cat"])
    torch.testing.assert_close(both[1:], weighted, atol=1e-6, rtol=1e-6)  # a prompt's neighbours do not matter


@torch.no_grad()
def test_a_prompt_that_is_too_long_says_what_was_cut(encoder: torch.nn.Module) -> None:
    prompt = " ".join(["dog"] * 74) + " (cat:1.2) and a (mouse)"
    with pytest.warns(UserWarning, match="75 tokens; left out: 'and a mouse'"):
        states = encode_weighted(encoder, [prompt])
    fits = encoder([" ".join(["dog"] * 74) + " cat"])
    factors = torch.ones(77)
    factors[75] = 1.2
    torch.testing.assert_close(states, fits * factors[:, None], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_clip_skip_is_the_norm_over_an_earlier_layer() -> None:
    encoder = fill(FrozenCLIPEmbedder(architecture=CLIP))
    transformer = encoder.transformer
    text = getattr(transformer, "text_model", transformer)
    tokens = encoder.tokenize(["a cat"])
    hidden = transformer(input_ids=tokens, output_hidden_states=True).hidden_states
    for skip in (1, 2, 3):
        with stopped_early(encoder, skip):
            states = encoder(["a cat"])
        torch.testing.assert_close(states, text.final_layer_norm(hidden[-skip]))
    torch.testing.assert_close(encoder(["a cat"]), text.final_layer_norm(hidden[-1]))


@torch.no_grad()
def test_clip_skip_of_open_clip_is_counted_from_the_end() -> None:
    encoder = fill(FrozenOpenCLIPEmbedder(architecture=OPEN_CLIP, layer="penultimate"))
    last = fill(FrozenOpenCLIPEmbedder(architecture=OPEN_CLIP, layer="last"))
    usual = encoder(["a cat"])
    with stopped_early(encoder, 1):
        torch.testing.assert_close(encoder(["a cat"]), last(["a cat"]))
    with stopped_early(encoder, 2):
        assert torch.equal(encoder(["a cat"]), usual)
    assert torch.equal(encoder(["a cat"]), usual)


@pytest.mark.parametrize("skip", [0, 4])
def test_layers_that_are_not_there(encoder: torch.nn.Module, skip: int) -> None:
    with pytest.raises(UserError, match=f"clip_skip {skip}.*3 layers"), stopped_early(encoder, skip):
        pass


def test_other_encoders_are_refused() -> None:
    labels = ClassEmbedder(8)
    with pytest.raises(UserError, match="ClassEmbedder is no CLIP"):
        encode_weighted(labels, ["a"])
    with pytest.raises(UserError, match="ClassEmbedder is no CLIP"), stopped_early(labels, 2):
        pass
    with stopped_early(labels, None):
        pass
