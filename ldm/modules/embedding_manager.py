"""Textual inversion (Gal et al., 2023, arXiv:2208.01618): new words for a text encoder, each of trained vectors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.encoders.clip_tokenizer import NewWordsTokenizer, clip_tokenizer
from ldm.util import UserError

PLACEHOLDER = "<sks>"
WHERE = "yaml: personalization_config"


class EmbeddingManager(nn.Module):
    """New words of one of CLIP's text encoders, which understands them from now on.

    The encoder's token embedding is looked up through this: numbers behind its vocabulary give the new vectors, all
    others what they gave. `remove_all` leaves the encoder as it was.

    Args:
        embedder: the encoder; it must have `tokenize` and a token embedding.
        placeholder_strings: the words.
        initializer_words: for each, the text whose tokens its vectors start as, by turns; None, or too few, takes the
            last one for the rest, or `object`.
        per_image_tokens, progressive_words: of the original; neither is available here.
        num_vectors_per_token: vectors of a word.

    Raises:
        UserError: the encoder has no token embedding, or a setting cannot be.
    """

    def __init__(
        self,
        embedder: nn.Module,
        placeholder_strings: Sequence[str] | None = (PLACEHOLDER,),
        initializer_words: Sequence[str] | None = None,
        per_image_tokens: bool = False,
        num_vectors_per_token: int = 1,
        progressive_words: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__()
        for name, value in (("per_image_tokens", per_image_tokens), ("progressive_words", progressive_words)):
            if value:
                raise UserError(f"{WHERE}.{name}: is not available here; set it false")
        if type(num_vectors_per_token) is not int or not 1 <= num_vectors_per_token <= 75:
            raise UserError(f"{WHERE}.num_vectors_per_token holds {num_vectors_per_token!r}; it must be 1 to 75")
        self._encoder = (embedder,)  # not a part of this module
        self.layer = (_token_embedding(embedder),)
        self.string_to_param_dict = nn.ParameterDict()
        words = list(placeholder_strings or ())
        given = list(initializer_words or ()) or ["object"]
        self.initializers = {word: given[min(i, len(given) - 1)] for i, word in enumerate(words)}
        for word in words:
            self.add(word, torch.zeros(num_vectors_per_token, self.layer[0].embedding_dim))

    @property
    def words(self) -> list[str]:
        """The new words."""
        return list(self.string_to_param_dict)

    def add(self, word: str, vectors: torch.Tensor) -> None:
        """Let `word` stand for `vectors` [n, D].

        Raises:
            UserError: the word cannot be one, is there already, or the vectors are another encoder's.
        """
        width = self.layer[0].embedding_dim
        if not word.strip() or "." in word or any(c.isspace() for c in word):
            raise UserError(f"textual inversion: '{word}' cannot be a new word; use one like <toy>")
        if word.lower() in (known.lower() for known in self.words):
            raise UserError(f"textual inversion: the word '{word}' is there already; name another")
        if hasattr(self.string_to_param_dict, word):
            raise UserError(
                f"textual inversion: '{word}' cannot be a new word, as modules have an attribute of this name; use one "
                "like <toy> (a file of vectors that says no word is called by its own name)"
            )
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise UserError(
                f"textual inversion: '{word}' has vectors of {vectors.shape[-1]} numbers, and this text encoder's have "
                f"{width}: they are of another kind of model"
            )
        self.string_to_param_dict[word] = nn.Parameter(vectors.detach().clone().float())
        self._install()

    def remove(self, word: str) -> None:
        """Forget a word."""
        del self.string_to_param_dict[word]
        self._install()

    def remove_all(self) -> None:
        """Forget all words: the encoder is as it was."""
        for word in self.words:
            del self.string_to_param_dict[word]
        self._install()

    def _install(self) -> None:
        (encoder,), (layer,) = self._encoder, self.layer
        vars(encoder).pop("tokenizer", None)
        vars(layer).pop("forward", None)
        if not self.words:
            return
        first, numbers = layer.num_embeddings, {}
        for word, vectors in self.string_to_param_dict.items():
            numbers[word] = range(first, first + len(vectors))
            first += len(vectors)
        encoder.tokenizer = NewWordsTokenizer(numbers)
        layer.forward = self.look_up

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, D] of token numbers [B, T], new words among them."""
        (layer,) = self.layer
        known = tokens < layer.num_embeddings
        usual = type(layer).forward(layer, torch.where(known, tokens, 0))
        table = torch.cat(list(self.string_to_param_dict.values())).to(usual)
        new = F.embedding((tokens - layer.num_embeddings).clamp(min=0), table)
        return torch.where(known[..., None], usual, new)

    def mentions(self, text: str) -> bool:
        """Whether a new word is in `text`."""
        tokenizer = vars(self._encoder[0]).get("tokenizer")
        return tokenizer is not None and tokenizer.mentions(text)

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""
        return self.string_to_param_dict.parameters()

    @torch.no_grad()
    def initialise(self) -> None:
        """Start every word's vectors as the token embeddings of its initialiser, whose weights are loaded by now."""
        for word, text in self.initializers.items():
            vectors = self.string_to_param_dict[word]
            vectors.copy_(self.start_of(text, len(vectors)))

    def start_of(self, text: str, count: int) -> torch.Tensor:
        """The embeddings [count, D] of a text's tokens, by turns.

        Raises:
            UserError: it has none.
        """
        numbers = clip_tokenizer().encode(text)
        if not numbers:
            raise UserError(f"{WHERE}.initializer_words: '{text}' has no tokens; name a word such as toy")
        weight = self.layer[0].weight
        return weight[torch.tensor([numbers[i % len(numbers)] for i in range(count)], device=weight.device)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the words to a file that diffusers and the web UIs read, see `ldm.exchange.embeddings`."""
        from ldm.exchange import embeddings

        embeddings.write(dict(self.string_to_param_dict), path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the words of a file; those of the same name are replaced, and a single word by a single one of any name.

        Raises:
            UserError: the file cannot be read, is another encoder's, or has none of the words.
        """
        from ldm.exchange import embeddings

        found = embeddings.read(path)
        if len(found) == len(self.words) == 1:
            found = dict(zip(self.words, found.values(), strict=True))
        if self.words and not set(self.words) & set(found):
            raise UserError(
                f"textual inversion: '{path}' has vectors of {', '.join(found)}, and the new words are "
                f"{', '.join(self.words)}; call a new word as the file does"
            )
        for word, vectors in found.items():
            if word in self.words:
                self.remove(word)
            self.add(word, vectors)


def _token_embedding(encoder: nn.Module) -> nn.Embedding:
    """The layer of a text encoder that looks up token numbers.

    Raises:
        UserError: it has none.
    """
    if hasattr(encoder, "transformer") and hasattr(encoder.transformer, "get_input_embeddings"):
        return encoder.transformer.get_input_embeddings()
    layer = getattr(getattr(encoder, "model", None), "token_embedding", None)
    if not isinstance(layer, nn.Embedding) or not hasattr(encoder, "tokenize"):
        raise UserError(f"textual inversion: {type(encoder).__name__} is no CLIP text encoder, so it has no new words")
    return layer
