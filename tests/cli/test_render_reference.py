"""The manual's reference of the yaml files says what the classes themselves say."""

import ast
import inspect
from pathlib import Path

import pytest
import yaml

from ldm.errors import UserError
from ldm.util import get_obj_from_str
from scripts import render_reference as reference
from tests.cli.sampling_model import ROOT


def test_the_page_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference.main(["--check"])
    page = tmp_path / "yaml.md"
    page.write_text(reference.PAGE.read_text().replace("whole number", "number"))
    with pytest.raises(UserError, match="not current; run scripts/render_reference.py"):
        reference.main(["--check", "--page", str(page)])
    reference.main(["--page", str(page)])
    assert page.read_text() == reference.PAGE.read_text() and str(page) in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for names in reference.TARGETS.values() for name in names])
def test_parameters_are_those_of_the_class(name: str) -> None:
    signature = inspect.signature(get_obj_from_str(name)).parameters.values()
    usual = {p.name: p.default for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    target = reference.describe(name)
    if target.parameters or not target.base:
        assert {p.name for p in target.parameters} == set(usual)
    for parameter in target.parameters:
        default = usual[parameter.name]
        assert (parameter.default is None) == (default is inspect.Parameter.empty), parameter
        written = reference.default_in_yaml(parameter.default)
        if default is not inspect.Parameter.empty and written:
            value = yaml.safe_load(written.strip("`"))
            assert value == (list(default) if isinstance(default, tuple) else default), parameter


def test_every_target_of_the_yaml_files_is_in_it() -> None:
    named = set()
    for path in [*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("models/*/*.yaml")]:
        lines = [line.partition("#")[0] for line in path.read_text().splitlines()]
        named |= {line.split("target:")[1].strip(" {}").split(",")[0] for line in lines if "target:" in line}
    own = {name for name in named if not name.startswith("torch.")} - {"ldm.evaluation.noise_study.RememberedText"}
    known = [reference.find(name) for names in reference.TARGETS.values() for name in names]
    assert own and {name for name in own if reference.find(name) not in known} == set()


def test_a_parameter_that_nothing_explains_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = ast.parse('class Silent:\n    """Says nothing."""\n    def __init__(self, size: int) -> None: ...').body
    monkeypatch.setattr(reference, "body_of", lambda module: silent)
    with pytest.raises(UserError, match="silent.Silent: its docstring's Args lack size"):
        reference.describe("silent.Silent")
