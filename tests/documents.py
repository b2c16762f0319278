"""The repository's documents as tests read them: fenced blocks, commands, links."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("python", "torchrun", "srun", "make", "pip", "conda", "hf", "tensorboard", "source")
FENCED = r"^( *)```(\w*)\n(.*?)^\1```$"  # also within a list
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "models/*/README.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)


@dataclass(frozen=True)
class Command:
    """One command of a document, its continued lines joined, its comment dropped."""

    document: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def program(self) -> tuple[str, list[str]] | None:
        """(the program of the repository that it runs, its arguments), or None."""
        for i, word in enumerate(self.words):
            if word.endswith(".py"):
                return word, self.words[i + 1 :]
        return None


@functools.cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str = "") -> list[str]:
    """A document's fenced blocks of that language; "" are the shell's."""
    found = re.findall(FENCED, text_of(document), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(text) for _, name, text in found if name == language]


def prose(document: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(FENCED, "", text_of(document), flags=re.MULTILINE | re.DOTALL)


def spans(document: str) -> list[str]:
    """The `code` within a document's sentences and tables, lines joined."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def commands(document: str) -> Iterator[Command]:
    """A document's commands: the whole ones among its sentences, and every line of its shell blocks, in their order."""
    for span in spans(document):
        if re.match(rf"({'|'.join(PROGRAMS)}) \S", span):
            yield Command(document, span)
    for block in blocks(document) + blocks(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield Command(document, " ".join(map(_quoted, words)))


def _quoted(word: str) -> str:
    return f'"{word}"' if re.search(r"[\s<>()]", word) else word


def all_commands() -> list[Command]:
    """The commands of all documents."""
    return [command for document in DOCUMENTS for command in commands(document)]


@functools.cache
def help_of(script: str) -> subprocess.CompletedProcess[str]:
    """What a program says to --help, and on stderr what it imported for that."""
    command = [sys.executable, "-X", "importtime", script, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
