"""CLIP's byte-pair tokens (Radford et al., 2021), from the vocabulary that ships inside open_clip: no download."""

from __future__ import annotations

import gzip
import html
import importlib.util
from functools import lru_cache
from pathlib import Path

import ftfy
import regex

from ldm.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # of the merge list, the first this many are CLIP's
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def merges_file() -> Path:
    """Where open_clip keeps CLIP's merges, found without the seconds that importing it takes."""
    spec = importlib.util.find_spec("open_clip")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("CLIP's vocabulary is missing: install open_clip_torch (pip install open_clip_torch)")
    return path


def byte_symbols() -> dict[int, str]:
    """A printable symbol for each byte: itself where it is printable, else a code point from 256 on (GPT-2's map)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in symbols)
    return symbols | {byte: chr(256 + n) for n, byte in enumerate(others)}


class ClipTokenizer:
    """Text -> token numbers, exactly CLIP's; case and runs of white space do not matter."""

    def __init__(self) -> None:
        with gzip.open(merges_file(), "rt", encoding="utf-8") as file:
            merges = [tuple(line.split()) for line in file.read().split("\n")[1 : MERGES + 1]]
        self.byte_symbols = byte_symbols()
        symbols = sorted(self.byte_symbols.values(), key=lambda s: (ord(s) > 255, ord(s)))
        words = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
        self.encoder = {word: number for number, word in enumerate(words)}
        self.decoder = {number: word for word, number in self.encoder.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start, self.end = self.encoder[START], self.encoder[END]
        self.bytes_of = {symbol: byte for byte, symbol in self.byte_symbols.items()}
        self._split = lru_cache(maxsize=2**16)(self._merge)

    def _merge(self, word: str) -> tuple[str, ...]:
        """The byte-pair pieces of a word in byte symbols, the last with an end mark."""
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            best = min(zip(pieces, pieces[1:]), key=lambda pair: self.ranks.get(pair, float("inf")))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(pieces):
                if tuple(pieces[i : i + 2]) == best:
                    merged.append("".join(best))
                    i += 2
                else:
                    merged.append(pieces[i])
                    i += 1
            pieces = merged
        return tuple(pieces)

    def encode(self, text: str) -> list[int]:
        """Token numbers of `text`, without start and end."""
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = " ".join(text.split()).strip().lower()
        numbers = []
        for word in WORD.findall(text):
            if word in (START, END):
                numbers.append(self.encoder[word])
                continue
            symbols = "".join(self.byte_symbols[byte] for byte in word.encode("utf-8"))
            numbers.extend(self.encoder[piece] for piece in self._split(symbols))
        return numbers

    def decode(self, numbers: list[int]) -> str:
        """The text of token numbers, lower-case."""
        text = "".join(self.decoder[n] for n in numbers).replace("</w>", " ")
        raw = bytearray()
        for symbol in text:
            raw += bytes([self.bytes_of[symbol]]) if symbol in self.bytes_of else symbol.encode("utf-8")
        return raw.decode("utf-8", errors="replace").strip()


@lru_cache(maxsize=1)
def clip_tokenizer() -> ClipTokenizer:
    """The tokenizer, read once a process."""
    return ClipTokenizer()
