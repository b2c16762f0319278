"""CLIP's byte-pair tokens (Radford et al., 2021), with the vocabulary that ships inside open_clip."""

from __future__ import annotations

import gzip
import importlib.util
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ldm.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 49408  # 256 byte symbols, the same at a word's end, merges, start and end
MERGES = VOCABULARY - 2 * 256 - 2
# Contractions, words, single digits, runs of anything else.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def merges_file() -> Path:
    """Where open_clip keeps CLIP's merges, found without the seconds that importing it takes.

    Raises:
        UserError: open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("CLIP's vocabulary is missing: install it with `pip install open_clip_torch`")
    return path


def read_merges() -> list[tuple[str, str]]:
    """The pairs of symbols that CLIP merges, most important first; the file's first line is a comment."""
    with gzip.open(merges_file(), "rt", encoding="utf-8", newline="\n") as file:
        return [tuple(line.split()) for line in islice(file, 1, 1 + MERGES)]


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token -> number: bytes (as printable symbols), bytes that end a word, merged pairs, start, end."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [symbol + "</w>" for symbol in symbols]
    words = [*symbols, *endings, *("".join(pair) for pair in merges), START, END]
    return {word: number for number, word in enumerate(words)}


class ClipTokenizer:
    """Text -> token numbers, as transformers' and so Stable Diffusion v1's CLIP tokenizer gives them.

    Case and the length of white space do not matter; `<|startoftext|>` and `<|endoftext|>` in a text are the
    special tokens themselves.
    """

    def __init__(self) -> None:
        merges = read_merges()
        vocab = vocabulary(merges)
        self.start, self.end = vocab[START], vocab[END]
        model = models.BPE(vocab=vocab, merges=merges, unk_token=END, end_of_word_suffix="</w>")
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in (START, END)])

    def encode(self, text: str) -> list[int]:
        """Token numbers of `text`, without start and end."""
        return self._encode(text)[0]

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of token numbers, in lower case, words set apart by one space."""
        text = self._tokenizer.decode(list(numbers), skip_special_tokens=False)
        return text.replace("</w>", " ").strip()

    def split(self, text: str, room: int) -> tuple[list[int], str]:
        """The first `room` token numbers of `text`, and the text, as written, that has no place in them."""
        numbers, places, text = self._encode(text)
        if len(numbers) <= room:
            return numbers, ""
        rest = text[places[room] :]
        return numbers[:room], rest.strip() or rest

    def rows(self, texts: Sequence[str], length: int, pad: int) -> list[list[int]]:
        """A row of `length` numbers for every text: start, the text's, end, and `pad` as often as there is room.

        Of a text of more than length - 2 tokens, the rest is cut off and shown in a warning.
        """
        rows = []
        for text in texts:
            numbers, rest = self.split(text, length - 2)
            if rest:
                warnings.warn(f"the prompt is longer than {length - 2} tokens; left out: '{rest}'", stacklevel=3)
            row = [self.start, *numbers, self.end]
            rows.append(row + [pad] * (length - len(row)))
        return rows

    def _encode(self, text: str) -> tuple[list[int], list[int], str]:
        """Token numbers, the place in the text at which each begins, and the text."""
        text = text.encode("utf-8", "replace").decode()  # bytes of a command line that are no text become "?"
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets], text


class NewWordsTokenizer(ClipTokenizer):
    """CLIP's tokenizer with words of textual inversion: each stands for token numbers of its own.

    A word that begins and ends with letters or digits is one only between others; `<toy>` is one anywhere. Case does
    not matter.

    Args:
        words: each with its token numbers.
    """

    def __init__(self, words: Mapping[str, Sequence[int]]) -> None:
        self._tokenizer = clip_tokenizer()._tokenizer
        self.start, self.end = clip_tokenizer().start, clip_tokenizer().end
        self.words = {word.lower(): list(numbers) for word, numbers in words.items()}
        longest_first = sorted(self.words, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(_as_pattern, longest_first)), re.IGNORECASE)

    def mentions(self, text: str) -> bool:
        """Whether any of the words is in `text`."""
        return bool(self.words) and self.pattern.search(text) is not None

    def _encode(self, text: str) -> tuple[list[int], list[int], str]:
        text = text.encode("utf-8", "replace").decode()
        numbers: list[int] = []
        places: list[int] = []
        end = 0
        matches = list(self.pattern.finditer(text)) if self.words else []
        for start, stop, word in [*((m.start(), m.end(), m[0].lower()) for m in matches), (len(text), len(text), "")]:
            ids, offsets, _ = super()._encode(text[end:start])
            own = self.words.get(word, [])
            numbers += [*ids, *own]
            places += [*(end + offset for offset in offsets), *(start for _ in own)]
            end = stop
        return numbers, places, text


def _as_pattern(word: str) -> str:
    before, after = (r"\b" if word[place].isalnum() else "" for place in (0, -1))
    return f"{before}{re.escape(word)}{after}"


def tokenizer_of(encoder: object) -> ClipTokenizer:
    """The tokenizer of one of CLIP's text encoders: the usual one, or that with its new words."""
    return vars(encoder).get("tokenizer") or clip_tokenizer()


@lru_cache(maxsize=1)
def clip_tokenizer() -> ClipTokenizer:
    """The tokenizer, read once a process."""
    return ClipTokenizer()
