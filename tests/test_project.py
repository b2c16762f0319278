"""The repository as a newcomer meets it: packaging files agree, programs answer, layers hold."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.documents import help_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS = sorted(
    str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")] if p.name[0] != "_"
)


def requirements(python: str) -> list[Requirement]:
    """What pyproject.toml asks for under that Python, extra `dev` included."""
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    found = map(Requirement, lines)
    return [r for r in found if r.marker is None or r.marker.evaluate({"python_version": python})]


def pins(python: str) -> dict[str, str]:
    """Name -> version of constraints.txt under that Python."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found: dict[str, str] = {}
    for pin in map(Requirement, filter(None, lines)):
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and pin.url is None, pin
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = specifier.version
    return found


def tracked_files() -> list[Path]:
    """Files under version control, all others left aside."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_lie_in_the_ranges_of_pyproject(python: str) -> None:
    pinned = pins(python)
    for requirement in requirements(python):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but constraints.txt says {version}"


def test_every_python_of_the_classifiers_is_admitted() -> None:
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named == list(PYTHONS)
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(p) for p in named)


def test_environment_yaml_says_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert environment["name"] == "ldm"
    *packages, from_pip = environment["dependencies"]
    assert packages == ["python=3.11", "pip"]
    assert packages[0].removeprefix("python=") in PYTHONS
    assert from_pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    folders = "|".join(["root", "work", "home", "Users"])
    registries = "|".join(["pypi" + r"\.org", "python" + "hosted", "index" + "-url", "find" + "-links", "file" + "://"])
    forbidden = re.compile(rf"(?<![\w.*}}-])/(?:{folders})/|{registries}")
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hits = [line for line in text.splitlines() if forbidden.search(line)]
        assert not hits, f"{path.relative_to(ROOT)}: {hits[0][:120]}"


def test_no_weights_but_the_tiny_ones_are_tracked() -> None:
    large = [p for p in tracked_files() if p.stat().st_size > 2**20 and ROOT / "models/tiny" not in p.parents]
    assert not large
    assert sum(p.stat().st_size for p in (ROOT / "models/tiny").rglob("*") if p.is_file()) <= 40 * 10**6


@pytest.mark.parametrize("target", ["help", "demo", "test", "docs", "lint", "clean"])
def test_make_knows_its_targets(target: str) -> None:
    done = make("-n", target)
    assert done.returncode == 0, done.stderr


def test_make_gives_each_worker_its_share_of_the_cores() -> None:
    line = make("-n", "test", "WORKERS=1").stdout.splitlines()[-1]
    threads, workers = re.search(r"OMP_NUM_THREADS=(\d+) .* -n (\d+) ", line).groups()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert workers == "1" and int(threads) == cores


def test_make_help_lists_every_target() -> None:
    listed = re.findall(r"make (\w+)", make("help").stdout)
    assert listed == re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 8, 0); $2"\n')
    old.chmod(0o755)
    done = make("--always-make", f"PYTHON={old}", "test")
    assert done.returncode != 0
    assert "error: Python 3.10 or newer is needed" in done.stderr and "Traceback" not in done.stderr


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make --no-print-directory test")


@pytest.mark.parametrize("path", sorted((ROOT / "ldm").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_ldm_imports_no_program(path: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    assert not names & {"scripts", "main", "main_dream_booth", "sample", "tests"}


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_help_answers_without_heavy_imports(script: str) -> None:
    done = help_of(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "omegaconf", "transformers", "pytorch_lightning", "PIL", "scipy"}
