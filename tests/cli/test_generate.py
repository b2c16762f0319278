import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from tests.cli.sampling_model import main_of, write_model
from tests.programs import ROOT, start_warm

SCRIPT = "scripts/generate.py"
COUNT = 24


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of all runs but --outdir."""
    folder = tmp_path_factory.mktemp("model")
    config, checkpoint = write_model(folder)
    (folder / "prompts.txt").write_text("a red ring\na blue star\na green cross\n")
    return [
        "--prompts", str(folder / "prompts.txt"), "--config", str(config), "--ckpt", str(checkpoint), "--device", "cpu",
        "--ddim_steps", "2", "--seed", "7",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def generate() -> Callable[[list[str]], None]:
    return main_of(SCRIPT)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): np.array(Image.open(path)) for path in folder.glob("*/*.png")}


def test_pictures_are_those_of_txt2img(words: list[str], generate: Callable, tmp_path: Path) -> None:
    from ldm.inference import load_model, txt2img

    generate([*words, "--count", "5", "--batch_size", "2", "--exact", "--outdir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [7, 8, 9, 10, 11]
    assert [row["prompt"] for row in rows] == [
        "a red ring",
        "a blue star",
        "a green cross",
        "a red ring",
        "a blue star",
    ]
    model = load_model(words[3], words[5], "cpu")
    for row in rows:
        alone = txt2img(model, row["prompt"], seed=row["seed"], steps=2, progress=False)[0]
        with Image.open(tmp_path / row["file"]) as image:
            assert np.array_equal(np.array(image), np.array(alone.image))
            assert image.text["parameters"] == alone.settings.parameters()


def test_two_processes_that_are_killed_leave_what_one_goes_on_from(
    words: list[str], generate: Callable, tmp_path: Path
) -> None:
    words = [*words, "--count", str(COUNT), "--batch_size", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    generate([*words, "--outdir", str(whole)])
    started = [SCRIPT, *words, "--ddim_steps", "2", "--processes", "2", "--outdir", killed]
    process = start_warm(*started, OMP_NUM_THREADS="1")
    deadline = time.monotonic() + 240
    while not pixels(killed):
        assert time.monotonic() < deadline and process.exitcode is None
        time.sleep(0.01)
    process.kill()
    process.join()
    before = -1
    while before != len(found := list(killed.glob("*/*.png"))):  # the two end at their next batch
        before = len(found)
        time.sleep(1)
    assert len(found) < COUNT
    times = {path: path.stat().st_mtime_ns for path in found}
    generate([*words, "--outdir", str(killed)])
    assert {path: path.stat().st_mtime_ns for path in found} == times
    ours, theirs = pixels(whole), pixels(killed)
    assert ours.keys() == theirs.keys() and len(ours) == COUNT
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert (whole / "manifest.jsonl").read_text() == (killed / "manifest.jsonl").read_text()


def test_the_processes_of_torchrun_share_the_work(
    words: list[str], generate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (1, 0):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        generate([*words, "--batch_size", "1", "--outdir", str(tmp_path)])
        assert len(pixels(tmp_path)) == (1 if rank else 3)


def test_torchrun_takes_no_flag_for_its_own() -> None:
    from torch.distributed.run import get_args_parser

    spec = importlib.util.spec_from_file_location("generate", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags = [flag for action in module.parser()._actions for flag in action.option_strings]
    assert len(flags) > 30
    for flag in flags:
        parsed = get_args_parser().parse_args(["--nproc_per_node", "2", SCRIPT, flag, "1"])
        assert parsed.training_script_args == [flag, "1"]


def test_a_process_that_fails_ends_all_in_one_line(words: list[str], generate: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        generate([*words, "--H", "33", "--processes", "2", "--outdir", str(tmp_path)])
    assert str(error.value) == "--H 33: must be a multiple of 8; the nearest is 32"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--prompts", "nowhere.txt"], "--prompts: there is no file 'nowhere.txt'"),
        (["--template", "a photo"], "must hold one {} for the label"),
        (["--seed", str(2**32 - 1)], "the last picture's would be above"),
        (["--ddim_eta", "0.5", "--plms"], "only DDIM sampling has it"),
    ],
)
def test_mistakes_end_in_one_line(
    more: list[str], message: str, words: list[str], generate: Callable, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        generate([*words, "--outdir", str(tmp_path), *more])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_settings_need_another_folder(words: list[str], generate: Callable, tmp_path: Path) -> None:
    generate([*words, "--count", "1", "--outdir", str(tmp_path)])
    with pytest.raises(UserError, match="scale was 7.5 and is 3.0"):
        generate([*words, "--count", "2", "--scale", "3", "--outdir", str(tmp_path)])
