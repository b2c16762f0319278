"""Captions and layouts as latent diffusion encodes them: BERT's word pieces and a transformer trained along."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.modules.x_transformer import Encoder, TransformerWrapper
from ldm.util import UserError

BERT_VOCABULARY = "models/bert-base-uncased/vocab.txt"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class BERTTokenizer:
    """Captions -> numbers of BERT's lower-case word pieces (Devlin et al., 2019), padded with [PAD].

    Args:
        vocab_path: `vocab.txt` of bert-base-uncased, one piece a line, or a folder that holds it.
        max_length: tokens of a caption, start and end among them.

    Raises:
        UserError: there is no such file, or it is no vocabulary of BERT's.
    """

    def __init__(self, vocab_path: str | os.PathLike[str] = BERT_VOCABULARY, max_length: int = 77) -> None:
        from tokenizers import BertWordPieceTokenizer

        pieces = read_vocabulary(vocab_path)
        self.max_length, self.size = max_length, len(pieces)
        self.pad, _, self.start, self.end = (pieces[word] for word in SPECIAL)
        self._tokenizer = BertWordPieceTokenizer(vocab=pieces, lowercase=True)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Token numbers [B, max_length]; of a caption that is too long the rest is shown in a warning."""
        room = self.max_length - 2
        rows = []
        for text in texts:
            text = text.encode("utf-8", "replace").decode()  # bytes of a command line that are no text become "?"
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            if len(encoding.ids) > room:
                rest = text[encoding.offsets[room][0] :].strip()
                warnings.warn(f"the prompt is longer than {room} tokens; left out: '{rest}'", stacklevel=2)
            row = [self.start, *encoding.ids[:room], self.end]
            rows.append(row + [self.pad] * (self.max_length - len(row)))
        return torch.tensor(rows, dtype=torch.long)


def read_vocabulary(path: str | os.PathLike[str]) -> dict[str, int]:
    """Piece -> number from a `vocab.txt`, or from the folder that holds it.

    Raises:
        UserError: there is no such file, or it lacks BERT's special tokens.
    """
    file = Path(path) / "vocab.txt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(
            f"BERT's vocabulary: there is no file '{file}'; put vocab.txt of bert-base-uncased there, "
            "or name it with model.params.cond_stage_config.params.vocab_path"
        )
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"BERT's vocabulary: '{file}' is no text: {error}") from error
    pieces = {line.strip(): number for number, line in enumerate(lines)}
    lacking = [word for word in SPECIAL if word not in pieces]
    if lacking:
        raise UserError(f"BERT's vocabulary: '{file}' has no line {lacking[0]}; is it vocab.txt of bert-base-uncased?")
    return pieces


class BERTEmbedder(nn.Module):
    """Captions, or numbers of tokens [B, N] without tokenizer, -> [B, N, n_embed].

    State-dict keys are `transformer.*`, as in CompVis' checkpoints.

    Args:
        n_embed, n_layer: width and depth. heads, dim_head: of its attention.
        vocab_size, max_seq_len: different tokens, and tokens of a condition.
        device: unused; the tokens go where the weights are.
        use_tokenizer: conditions are captions.
        embedding_dropout: of the token embeddings, in training.
        vocab_path: `vocab.txt` of bert-base-uncased or the folder that holds it; it is first read when a caption
            comes, so that models can be built and converted without it.

    Raises:
        UserError: a `vocab_path` was given and there is nothing.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str = "cpu",
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        vocab_path: str | os.PathLike[str] | None = None,
        heads: int = 8,
        dim_head: int = 64,
    ) -> None:
        super().__init__()
        self.use_tknz_fn, self.vocab_size, self.max_seq_len = use_tokenizer, vocab_size, max_seq_len
        self.vocab_path = vocab_path or BERT_VOCABULARY
        if use_tokenizer and vocab_path is not None:
            self.check_files()
        layers = Encoder(n_embed, n_layer, heads, dim_head)
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, layers, embedding_dropout)

    def check_files(self) -> None:
        """Raise UserError when the vocabulary is missing, or is larger than the model's."""
        if self.use_tknz_fn and self.tknz_fn.size > self.vocab_size:
            raise UserError(
                f"BERT's vocabulary: '{self.vocab_path}' has {self.tknz_fn.size} lines, the model {self.vocab_size}"
            )

    @cached_property
    def tknz_fn(self) -> BERTTokenizer:
        """The tokenizer, read at its first use."""
        return BERTTokenizer(self.vocab_path, self.max_seq_len)

    def forward(self, text: str | Sequence[str] | torch.Tensor) -> torch.Tensor:
        if self.use_tknz_fn:
            tokens = self.tknz_fn([text] if isinstance(text, str) else text)
        else:
            tokens = torch.as_tensor(text)
        return self.transformer(tokens.to(self.transformer.token_emb.weight.device), return_embeddings=True)

    def encode(self, text: Any) -> torch.Tensor:
        """The same as calling it."""
        return self(text)
