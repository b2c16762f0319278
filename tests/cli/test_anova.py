"""scripts/anova.py: runs are made once, and the analysis is statistics' own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ldm.errors import UserError
from ldm.util import load_yaml
from scripts.anova import PLACEMENTS, Trial, analyse
from scripts.anova import main as anova


def record(din: str, dout: str, seed: int, y: float, **more: object) -> dict:
    return {"din": din, "dout": dout, "form": "relu", "size": 60, "scale": 1.0, "seed": seed, "y": y} | more


def test_placements_are_all_that_adapters_may_have() -> None:
    from ldm.modules.adapters import FAMILIES

    possible = {f"{din}-{dout}" for family in FAMILIES for din in family.order for dout in family.outputs_for(din)}
    assert set(PLACEMENTS) == possible


def test_factors_alone_are_as_scipy_says() -> None:
    draw = np.random.default_rng(0).normal
    runs = [record(*p.split("-"), seed, draw()) for p in PLACEMENTS if "res" not in p for seed in range(3)]
    runs += [record("attn2o", "ffni", seed, draw(), size=size) for size in (15, 240) for seed in range(3)]
    rows = {row["factor"]: row for row in analyse(runs, "y")}
    placed = [r for r in runs if r["size"] == 60]
    for factor, key, among in (("input", "din", placed), ("output", "dout", placed), ("size", "size", None)):
        among = among or [r for r in runs if (r["din"], r["dout"]) == ("attn2o", "ffni")]
        levels = [[r["y"] for r in among if r[key] == level] for level in {r[key] for r in among}]
        expected = stats.f_oneway(*levels)
        assert rows[factor]["F"] == pytest.approx(expected.statistic)
        assert rows[factor]["p"] == pytest.approx(expected.pvalue)
        assert rows[factor]["df"] == len(levels) - 1


def test_what_made_the_numbers_is_found() -> None:
    draw = np.random.default_rng(1).normal
    places = [p.split("-") for p in PLACEMENTS if "res" not in p]
    effect = {din: 5 * draw() for din in {din for din, _ in places}}
    added = [
        record(din, dout, seed, effect[din] + 0.1 * draw()) for (din, dout), seed in itertools.product(places, "012")
    ]
    rows = {row["factor"]: row for row in analyse(added, "y")}
    assert rows["input"]["share"] > 0.95 and rows["input, beyond the output"]["p"] < 1e-6
    assert rows["output, beyond the input"]["p"] > 1e-3 and rows["interaction of both"]["p"] > 1e-3
    mixed = [r | {"y": r["y"] + (3.0 if (r["din"], r["dout"]) == ("attn1i", "ffni") else 0.0)} for r in added]
    assert {row["factor"]: row for row in analyse(mixed, "y")}["interaction of both"]["p"] < 1e-6


def test_a_trial_is_one_adapter_of_the_yaml() -> None:
    trial = Trial("attn1o", "transo", "silu", 15, 0.5, 3)
    config = load_yaml("configs/tiny/dreambooth.yaml", overrides=trial.words)
    assert config.model.params.unet_config.params.adapter_config == {
        "transformer_adp_config": [{"din": "attn1o", "dout": "transo", "method": "silu", "mid_dim": 15, "scale": 0.5}],
        "resblock_adp_config": None,
    }


def test_runs_are_made_once_and_analysed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--placements", "attn1i-ffni", "--forms", "--sizes", "--scales", "--seeds", "0", "1", "--steps", "2"]
    words += ["--prior_images", "2", "--pictures", "2", "--others", "2", "--sampling_steps", "2", "--processes", "1"]
    anova([*words, "--outdir", str(tmp_path)])
    assert "0 of 2 runs are there" in capfd.readouterr().out
    record = json.loads((tmp_path / "attn1i-ffni-relu-60-1-0.json").read_text())
    assert f"| attn1i | ffni | relu | 60 | 1.0 | {record['parameters']:,} |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "effects.png").is_file() and not list(tmp_path.glob("seed-0/runs/*"))
    anova([*words, "--outdir", str(tmp_path)])
    assert "are there" not in capfd.readouterr().out, "finished runs are kept"


def test_wrong_input_is_told_before_anything_is_run(tmp_path: Path) -> None:
    for words, message in (
        (["--seeds", "1"], "--seeds: variance within a group needs at least two"),
        (["--sizes", "0"], "--sizes 0: must be at least 1"),
        (["--subject", "cow"], "cow"),
        (["--ckpt", "nowhere"], "--ckpt: there is no file 'nowhere'"),
    ):
        with pytest.raises(UserError, match=message):
            anova([*words, "--outdir", str(tmp_path)])
