"""Prompts beyond plain text: `(word:1.2)` weights, and text encoders that stop before their last layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ldm.errors import UserError
from ldm.modules.encoders.clip_tokenizer import ClipTokenizer, tokenizer_of

STRONGER = 1.1  # a pair of round brackets
SYNTAX = re.compile(
    r"\\(?P<literal>[\\()\[\]])|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])"
)
MOST = 100.0

Weighted = list[tuple[str, float]]


def parse(prompt: str) -> Weighted:
    """Pieces of text with their weights, in the syntax of AUTOMATIC1111's web UI.

    `(text)` multiplies by 1.1, `((text))` by 1.21, `[text]` divides by 1.1, `(text:1.2)` multiplies by 1.2; `\\(`
    is a bracket itself. A bracket that is never closed counts to the end, one that was never opened is text.

    Raises:
        UserError: a weight is beyond +-100.
    """
    pieces: list[list[Any]] = []
    opened: list[tuple[str, int]] = []  # bracket, and the first piece in it

    def multiply(first: int, factor: float) -> None:
        for piece in pieces[first:]:
            piece[1] *= factor

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        multiply(opened.pop()[1], factor)
        return True

    end = 0
    for match in SYNTAX.finditer(prompt):
        pieces.append([prompt[end : match.start()], 1.0])
        end = match.end()
        if match["literal"]:
            pieces.append([match["literal"], 1.0])
        elif match["open"]:
            opened.append((match["open"], len(pieces)))
        elif match["weight"] and opened and opened[-1][0] == "(":
            close("(", _number(match["weight"]))
        elif match["weight"] or not close(
            {")": "(", "]": "["}[match["close"]], STRONGER if match["close"] == ")" else 1 / STRONGER
        ):
            pieces.append([match[0], 1.0])
    pieces.append([prompt[end:], 1.0])
    while opened:
        close(opened[-1][0], STRONGER if opened[-1][0] == "(" else 1 / STRONGER)
    return _joined(pieces)


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) <= MOST:
        raise UserError(f"prompt: the weight {text[:20]} is beyond {MOST:g}; weights are around 1")
    return value


def _joined(pieces: Sequence[Sequence[Any]]) -> Weighted:
    """Neighbours of the same weight as one piece, without empty ones."""
    joined: Weighted = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return joined


def encode_weighted(encoder: Any, prompts: Sequence[str]) -> torch.Tensor:
    """States [B, T, D] of weighted prompts: each token's state times its weight.

    Args:
        encoder: one of CLIP's, which has `tokenize`. What is beyond its length is cut off and shown in a warning.

    Raises:
        UserError: the encoder is none of CLIP's, or a weight is out of range.
    """
    if not hasattr(encoder, "tokenize"):
        raise UserError(f"prompt weighting: {type(encoder).__name__} is no CLIP text encoder; leave it off")
    empty = encoder.tokenize([""])[0]  # start, end, and as many of what it pads with as there is room
    tokenizer = tokenizer_of(encoder)
    rows = [_row(parse(prompt), empty, tokenizer) for prompt in prompts]
    states = _states(encoder, torch.stack([tokens for tokens, _ in rows]))
    weights = torch.stack([weights for _, weights in rows]).to(states)
    return states * weights[..., None]


def _row(pieces: Weighted, empty: torch.Tensor, tokenizer: ClipTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weights [T] of a prompt; start, end and padding have the weight 1."""
    left, cut = len(empty) - 2, []
    numbers: list[int] = []
    weights: list[float] = []
    for text, weight in pieces:
        fitting, rest = tokenizer.split(text, left)
        numbers += fitting
        weights += [weight] * len(fitting)
        left -= len(fitting)
        cut += [rest] if rest else []
    if cut:
        warnings.warn(f"the prompt is longer than {len(empty) - 2} tokens; left out: '{' '.join(cut)}'", stacklevel=3)
    tokens, factors = empty.clone(), torch.ones(len(empty))
    tokens[1 : len(numbers) + 1] = torch.tensor(numbers, dtype=tokens.dtype)
    tokens[len(numbers) + 1] = empty[1]
    factors[1 : len(numbers) + 1] = torch.tensor(weights)
    return tokens, factors


def _states(encoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The encoder's output for token numbers [B, T]."""
    device = next(encoder.parameters()).device
    if hasattr(encoder, "encode_with_transformer"):  # open_clip's
        return encoder.encode_with_transformer(tokens.to(device))
    return encoder.transformer(input_ids=tokens.to(device)).last_hidden_state


@contextmanager
def stopped_early(encoder: Any, clip_skip: int | None) -> Iterator[None]:
    """Within the block CLIP's text encoder ends at its last layer but `clip_skip` - 1; None leaves it as it is.

    The states still go through the final norm, as in AUTOMATIC1111's web UI.

    Raises:
        UserError: the encoder is none of CLIP's, or has no such layer.
    """
    if clip_skip is None:
        yield
        return
    owner, name, last = _depth_of(encoder)
    if not 1 <= clip_skip <= last:
        raise UserError(f"clip_skip {clip_skip}: this text encoder has {last} layers; give 1 to {last}")
    before = getattr(owner, name)
    setattr(owner, name, clip_skip - 1 if name == "layer_idx" else before[: last - clip_skip + 1])
    try:
        yield
    finally:
        setattr(owner, name, before)


def _depth_of(encoder: Any) -> tuple[Any, str, int]:
    """Where an encoder's layers are: (object, its attribute, number of layers)."""
    if hasattr(encoder, "layer_idx"):  # open_clip's: how many of the last layers are left out
        return encoder, "layer_idx", len(encoder.model.transformer.resblocks)
    text = getattr(encoder, "transformer", None)
    text = getattr(text, "text_model", text)
    layers = getattr(getattr(text, "encoder", None), "layers", None)
    if layers is None:
        raise UserError(f"clip_skip: {type(encoder).__name__} is no CLIP text encoder; leave it out")
    return text.encoder, "layers", len(layers)
