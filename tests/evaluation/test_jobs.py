"""Runs of a study in processes of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.evaluation.jobs import run_jobs
from ldm.loading import load_model


def test_all_run_and_what_they_print_is_kept(tmp_path: Path) -> None:
    seen: list[int] = []
    run_jobs({name: (print, (name, os.getpid())) for name in "abc"}, 2, tmp_path / "logs", seen.append)
    assert [(tmp_path / "logs" / f"{name}.log").read_text() for name in "abc"] == [
        f"{n} {os.getpid()}\n" for n in "abc"
    ]
    assert seen[-1] == 3 and seen == sorted(seen)


def test_one_that_fails_ends_the_others_and_says_why_in_a_line(tmp_path: Path) -> None:
    start = time.monotonic()
    wrong = (load_model, ("nowhere.yaml", "nowhere.ckpt", "cpu"))
    with pytest.raises(UserError, match=r"run bad failed: .*nowhere.* \(all that it said is in .*bad.log") as error:
        run_jobs({"long": (time.sleep, (600,)), "bad": wrong, "later": (print, ("x",))}, 2, tmp_path)
    assert "\n" not in str(error.value) and time.monotonic() - start < 500
    assert not (tmp_path / "later.log").exists()
    with pytest.raises(UserError, match="run dead failed: it ended with code 3"):
        run_jobs({"dead": (os._exit, (3,))}, 1, tmp_path)
