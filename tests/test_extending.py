"""docs/extending.md to the letter: its changes are made in a copy of the code, and its examples run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks, text_of

PAGE = "docs/extending.md"


def change(tree: Path, diff: str) -> None:
    """Make the changes of a diff without line numbers: each part's old lines must be in the file once."""
    name, *lines = diff.rstrip("\n").split("\n")
    path = tree / name.removeprefix("# ")
    text = path.read_text(encoding="utf-8")
    hunks = re.findall(r"((?:^[ -].*\n)*)((?:^\+.*\n)+)((?:^ .*\n)*)", "\n".join(lines) + "\n", re.MULTILINE)
    assert hunks, diff
    for before, added, after in hunks:
        old = [line[1:] for line in (before + after).splitlines()]
        kept = [line[1:] for line in before.splitlines() if line[0] == " "]
        new = kept + [line[1:] for line in (added + after).splitlines()]
        assert text.count("\n".join(old) + "\n") == 1, f"{name} has not exactly once: {old}"
        text = text.replace("\n".join(old) + "\n", "\n".join(new) + "\n")
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with everything that the page adds to it."""
    folder = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "ldm", folder / "ldm", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "models").symlink_to(ROOT / "models")
    for diff in blocks(PAGE, "diff"):
        change(folder, diff)
    for block in blocks(PAGE, "python"):
        if named := re.match(r"# (\S+\.py)\n", block):
            (folder / named[1]).write_text(block, encoding="utf-8")
    return folder


def test_every_example_runs(tree: Path) -> None:
    examples = [block for block in blocks(PAGE, "python") if not re.match(r"# \S+\.py\n", block)]
    sections = text_of(PAGE).split("\n## ")[1:]
    assert len(examples) == len(sections) and all("\n```python\n" in section for section in sections)
    program = "\n".join(
        f"exec(compile({block!r}, 'example {i + 1}', 'exec'), {{}})" for i, block in enumerate(examples)
    )
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tree / "outputs/ffnn-adapters").glob("*.pt"))


def test_what_yaml_files_name_is_there(tree: Path) -> None:
    targets = re.findall(r"(?:target|denoiser): (my_\w+)\.(\w+)", text_of(PAGE))
    assert len(targets) == 3
    for module, name in targets:
        assert f"class {name}(" in (tree / f"{module}.py").read_text(encoding="utf-8")
