"""What the documents name is there: links, headings, programs and their flags, files, make targets, Python names."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.documents import DOCUMENTS, ROOT, blocks, commands, help_of, prose, spans, text_of

documents = pytest.mark.parametrize("document", DOCUMENTS)


def anchors(path: Path) -> set[str]:
    """What links may name behind a #, as GitHub and the manual form it."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@documents
def test_it_has_one_title_and_no_heading_without_one_above(document: str) -> None:
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose(document), re.MULTILINE)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(level <= above + 1 for above, level in zip(levels, levels[1:], strict=False))


@documents
def test_links_and_pictures_exist(document: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(document)) + re.findall(r'(?:src|href)="([^"]+)"', prose(document))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ROOT / document if not name else (ROOT / document).parent / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_is_reached_from_the_front_and_from_the_menu() -> None:
    menu = re.findall(r"[\w-]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert sorted(menu) == sorted(pages)
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of("docs/index.md")))
    assert linked == pages - {"index.md"}


@documents
def test_commands_name_real_programs_and_flags(document: str) -> None:
    for command in commands(document):
        if command.program is None:
            continue
        script, arguments = command.program
        assert (ROOT / script).is_file(), command
        known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", help_of(script).stdout))
        unknown = {a.partition("=")[0] for a in arguments if re.match(r"--?[A-Za-z]", a)} - known
        assert not unknown, f"{command}: {script} has no {sorted(unknown)}"


@documents
def test_files_that_are_named_exist(document: str) -> None:
    words = {word for command in commands(document) for word in command.words} | set(spans(document))
    for word in words:
        own = re.fullmatch(r"(ldm|configs|models/tiny|scripts|tests|benchmarks|docs)/[\w./-]+", word)
        if own and word != "configs/project.yaml":  # which is in every run's folder
            assert (ROOT / word).exists(), word
        if re.fullmatch(r"configs/[\w./*-]+\*[\w./*-]*", word):
            assert list(ROOT.glob(word)), word


@documents
def test_make_targets_exist(document: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    for target in {command.words[1] for command in commands(document) if command.words[0] == "make"}:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr


@functools.cache
def names_of(module: str) -> frozenset[str] | None:
    """The names at the top of a module of the repository and, for a package, its modules; None: no such module."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = {child.stem for child in path.iterdir()} if path.is_dir() else set()
    if not file.is_file():
        return frozenset(names) if path.is_dir() else None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned = {target.id for target in targets if isinstance(target, ast.Name)}
            names |= assigned | (ast.literal_eval(node.value).keys() if "_LAZY" in assigned else set())
        elif hasattr(node, "name"):
            names.add(node.name)
    return frozenset(names)


def is_there(dotted: str) -> bool:
    """Whether a module, or a name at the top of one, is in the repository; what lies deeper is not looked at."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        names = names_of(".".join(parts[:n]))
        if names is not None:
            return n == len(parts) or parts[n] in names
    return False


@documents
def test_python_names_exist(document: str) -> None:
    for span in spans(document):
        if re.fullmatch(r"(ldm|main|main_dream_booth)(\.\w+)+", span) and not re.fullmatch(r"[\w/]+\.py", span):
            assert is_there(span), span
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "ldm":
                for alias in node.names:
                    assert is_there(f"{node.module}.{alias.name}"), f"{node.module}.{alias.name}"


@documents
def test_yaml_examples_can_be_read_and_name_real_classes(document: str) -> None:
    for block in blocks(document, "yaml"):
        assert yaml.safe_load(block)
        for target in re.findall(r"target: ((?:ldm|main|main_dream_booth)\.[\w.]+)", block):
            assert is_there(target), target


def test_the_manual_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for document in (ROOT / "docs").glob("*.md"):
        page = (tmp_path / "site" / f"{document.stem}.html").read_text(encoding="utf-8")
        assert "--8<--" not in page and "<h1" in page
