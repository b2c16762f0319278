"""Every command of the documents is run by a test: here in a short form, or by the test that `TABLE` names.

In a user's folder the small model stands for full-size ones, with yaml files of its own under their names. What a
document calls `logs/RUN`, `logs/<run>` or the like is the newest run.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.cli.sampling_model import ROOT, main_of
from tests.cli.test_own_checkpoint import commands as own_checkpoint_commands
from tests.documents import DOCUMENTS, Command, all_commands, commands


@dataclass(frozen=True)
class Short:
    """Run here, with these words behind its own."""

    words: str = ""


@dataclass(frozen=True)
class By:
    """Run by other tests, `file::function`."""

    tests: str


@dataclass(frozen=True)
class Left:
    """Not run, and why."""

    why: str


DRAW = "--ddim_steps 2 --n_samples 1 --n_iter 1 --device cpu"
QUIET = "lightning.trainer.logger=false data.params.batch_size=2 data.params.num_workers=0"
NO_PICTURES = "lightning.callbacks.image_logger.params.disabled=true"
TRAIN = f"--max_steps 1 {QUIET} {NO_PICTURES}"
WORLD = f"{TRAIN} data.params.train.params.length=4"
SLIM = "model.params.cond_stage_trainable=false model.params.unet_config.params.model_channels=32"
KARRAS = f"{TRAIN} {' '.join(f'lightning.callbacks.distances.params.{w}' for w in ('samples=8', 'references=8'))}"
ROWS = "autoencoder|loading|noise_assignment|sampler_overhead|startup|text_to_image|training_step|unet"
BENCHMARKS, STUDIES = "tests/benchmarks", "tests/cli"
SHELL = "part of the user's environment, which the tests run in"

# The beginning of a command, as a regular expression -> how it is run. The first that fits counts.
TABLE: tuple[tuple[str, Short | By | Left], ...] = (
    # make, environments, other people's programs
    ("make demo", By("tests/cli/test_demo.py::test_the_demo_tunes_draws_and_reports")),
    ("make docs", By("tests/test_documents.py::test_the_manual_builds_without_a_warning")),
    ("make help", By("tests/test_project.py::test_make_help_lists_every_target")),
    ("make test", By("tests/test_project.py::test_make_gives_each_worker_its_share_of_the_cores")),
    ("make (lint|format)", Left("they look at sources and not at what these do")),
    ("conda |pip |source ", Left(SHELL)),
    ("hf download", Left("a download")),
    ("tensorboard", Left("a server of somebody else's")),
    # several processes
    (r"python main.py .* --strategy ddp", Left("wants two GPUs; the line for torchrun has the same strategy")),
    (r"torchrun .* main.py", By("tests/cli/test_processes.py::test_the_line_for_torchrun")),
    ("MASTER_ADDR=", By("tests/cli/test_processes.py::test_the_line_for_two_machines")),
    ("srun|if |fi$", By("tests/cli/test_processes.py::test_the_script_for_slurm")),
    (
        r"torchrun .* scripts/generate.py",
        By("tests/cli/test_generate.py::test_the_processes_of_torchrun_share_the_work"),
    ),
    # studies and benchmarks
    (
        "python scripts/adapter_study.py",
        By(f"{STUDIES}/test_demo.py::test_the_study_compares_goes_on_and_says_who_wins"),
    ),
    ("python scripts/anova.py", By(f"{STUDIES}/test_anova.py::test_runs_are_made_once_and_analysed")),
    (
        "python scripts/compare_methods.py",
        By(f"{STUDIES}/test_compare_methods.py::test_runs_are_made_once_and_told_in_table_and_pictures"),
    ),
    (
        "python scripts/distill_study.py",
        By(f"{STUDIES}/test_distill_study.py::test_runs_are_made_once_and_told_in_table_and_picture"),
    ),
    ("python scripts/flash_study.py", By(f"{STUDIES}/test_flash_study.py::test_a_small_study_and_its_second_run")),
    (
        "python scripts/noise_study.py",
        By("tests/evaluation/test_noise_study.py::test_runs_are_made_once_and_told_in_table_and_curve"),
    ),
    (
        "python scripts/sampler_study.py",
        By("tests/evaluation/test_sampler_study.py::test_evaluations_are_counted_and_kept_to"),
    ),
    ("python benchmarks/flash_step.py", By(f"{BENCHMARKS}/test_flash_step.py::test_a_row_a_start")),
    ("python benchmarks/growing.py", By(f"{BENCHMARKS}/test_growing.py::test_both_are_trained_and_measured")),
    ("python benchmarks/kill.py", By("tests/cli/test_processes.py::test_killed_runs_end_as_one_that_never_was")),
    ("make bench|python benchmarks/bench.py", By(f"{BENCHMARKS}/test_side_by_side.py::test_a_row_alone")),
    (
        f"python benchmarks/({ROWS}).py",
        By(f"{BENCHMARKS}/test_side_by_side.py::test_every_file_of_rows_is_a_program"),
    ),
    ("python benchmarks/growth.py", By(f"{BENCHMARKS}/test_side_by_side.py::test_growth")),
    (
        "python benchmarks/pruned_unets.py",
        By(f"{BENCHMARKS}/test_pruned_unets.py::test_passes_and_a_step_are_measured"),
    ),
    (r"python \S+ --help", By("tests/test_project.py::test_help_answers_without_heavy_imports")),
    # the web page
    ("python scripts/webui.py", By("tests/web/test_hostile.py::test_fifty_hostile_requests_leave_it_serving")),
    ("python tests/web/screenshots.py", Left("takes the page's pictures; test_browser.py presses its buttons")),
    # scores
    (
        r"python scripts/evaluate.py --pictures .* --clip",
        By("tests/evaluation/test_quality.py::test_clip_score_is_the_scaled_cosine"),
    ),
    (
        r"python scripts/evaluate.py --pictures",
        By("tests/cli/test_evaluate.py::test_folders_are_scored_against_each_other_and_against_statistics"),
    ),
    (
        "python scripts/evaluate.py --reader-check",
        By("tests/cli/test_evaluate.py::test_the_reader_is_reported_without_a_model"),
    ),
    ("python scripts/evaluate.py", Short("--n 1 --ddim_steps 2 --device cpu --outdir outputs/scores")),
    # k-diffusion
    ("python main.py --base configs/karras/digits.yaml", Short(KARRAS)),
    ("python main.py --base configs/karras/photos", Short(f"{KARRAS} data.params.train.params.length=8")),
    ("python scripts/sample_diffusion.py", Short("-n 2 -c 2")),
    ("python scripts/likelihood.py", Short("--probes 2 --sigma_min 4 --sigma_max 5 --tolerance 0.5 --device cpu")),
    (
        "python scripts/sample_clip_guided.py",
        By("tests/cli/test_k_diffusion_programs.py::test_guidance_makes_pictures_more_like_the_text"),
    ),
    ("python scripts/convert_karras.py logs/RUN", Short()),
    (
        "python scripts/convert_karras.py config.json",
        By("tests/k_diffusion/test_convert.py::test_a_config_is_completed_and_its_parts_are_found"),
    ),
    (
        r"python scripts/convert_karras.py \S+.pth model.ckpt",
        By("tests/k_diffusion/test_convert.py::test_a_training_checkpoint_becomes_one_to_train_on_from"),
    ),
    (
        r"python scripts/convert_karras.py \S+.pth slim.safetensors",
        By("tests/k_diffusion/test_convert.py::test_a_training_checkpoint_becomes_one_to_sample_from"),
    ),
    ("python scripts/render_reference.py", By("tests/cli/test_render_reference.py::test_the_page_is_current")),
    # drawing
    (
        "python scripts/tests/test_watermark.py",
        By("tests/cli/test_protection.py::test_pictures_and_grids_carry_the_watermark"),
    ),
    (r"python (scripts/(txt2img|img2img|inpaint)|sample).py", Short(DRAW)),
    (
        "python scripts/generate.py",
        Short(
            "--config models/tiny/config.yaml --ckpt models/tiny/model.safetensors --count 2 "
            "--ddim_steps 2 --device cpu --processes 1"
        ),
    ),
    # training, and what comes of it
    ("python scripts/cache_latents.py", Short("data.params.train.params.length=4 --device cpu")),
    ("python scripts/convert.py", Short()),
    ("python scripts/train_features.py", Short("--steps 1 --batch_size 4 --out features.safetensors")),
    (r"python main.py --base configs/distill/sd", Short(TRAIN)),
    (r"python main.py --base configs/distill/tiny-tiny.yaml .* -n tiny", Short(WORLD)),
    (
        r"python main.py --base configs/distill/tiny",
        By("tests/cli/test_distillation.py::test_a_resumed_run_finds_its_teacher_and_goes_on_exactly"),
    ),
    (r"python main.py --base configs/distill/flash-tiny", Short(WORLD)),
    (r"python main.py --base configs/distill/flash-sd", Short(f"{WORLD} data.params.train.params.toys=0")),
    (r"python main.py --base configs/tiny/diffusion.yaml .* -n big --resume", Short(f"{WORLD} {SLIM} --max_steps 3")),
    (r"python main.py --base configs/tiny/diffusion.yaml", Short(f"{WORLD} {SLIM}")),
    (r"python main.py --base", Short(WORLD)),
    (r"python main.py --resume", Short("--max_steps 2")),
    (
        r"python main_dream_booth.py --base \S+ .* small-sd.safetensors",
        Short(f"{TRAIN} model.params.unet_config.params.channel_mult=[1,2]"),
    ),
    (r"python main_dream_booth.py", Short(TRAIN)),
)


@cache
def own_checkpoint() -> list[list[str]]:
    return own_checkpoint_commands()


@cache
def entry_of(command: Command) -> Short | By | Left | None:
    """How a command is run."""
    if command.words in own_checkpoint():
        return By("tests/cli/test_own_checkpoint.py::test_own_checkpoints_are_used_to_the_letter")
    return next((entry for pattern, entry in TABLE if re.match(pattern, command.text)), None)


def test_every_command_is_in_the_table() -> None:
    unknown = [str(command) for command in all_commands() if entry_of(command) is None]
    assert not unknown, (
        f"no test runs {unknown}; say in TABLE of {Path(__file__).name} with what words it is short, which test runs "
        "it, or why none does"
    )


def test_every_entry_has_a_command_and_every_test_that_it_names_is_there() -> None:
    used = [entry_of(command) for command in all_commands()]
    for pattern, entry in TABLE:
        assert any(entry is other for other in used), f"TABLE: no command needs {pattern}"
        if isinstance(entry, By):
            path, _, name = entry.tests.partition("::")
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), entry.tests


# ---- a user's folder ---------------------------------------------------------------------------------------------


def write_stand_ins(folder: Path, checkpoint: Path) -> None:
    """Small yaml files and weights under the names of full-size ones; `checkpoint` is the small model as a .ckpt."""
    configs = folder / "configs"
    shutil.copytree(ROOT / "configs", configs, ignore=shutil.ignore_patterns("templates"))
    shutil.copy(ROOT / "models/tiny/config.yaml", configs / "stable-diffusion/v1-inference.yaml")
    shutil.copy(configs / "tiny/dreambooth.yaml", configs / "sd-inject-dreambooth/attn2o-ffni.yaml")
    shutil.copy(configs / "distill/flash-tiny.yaml", configs / "distill/flash-sd.yaml")
    small, full = (OmegaConf.load(configs / f"distill/{name}.yaml") for name in ("tiny-small", "sd-small"))
    del small.model.params.ckpt_path, small.model.params.teacher_config.ckpt_path, full.lightning.trainer.precision
    full.data.params.train.params |= {"size": 64, "caption": "a picture"}
    OmegaConf.save(OmegaConf.merge(full, {"model": None}, {"model": small.model}), configs / "distill/sd-small.yaml")
    shutil.copytree(ROOT / "models/tiny", folder / "models/tiny")
    original = folder / "models/ldm/stable-diffusion-v1/model.ckpt"
    original.parent.mkdir(parents=True)
    for path in (original, folder / "TEACHER.ckpt", folder / "v1-5-pruned.ckpt"):
        path.symlink_to(checkpoint)


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a .ckpt."""
    from ldm.weight_files import read_state_dict, write_tensors

    path = tmp_path_factory.mktemp("tiny") / "tiny.ckpt"
    write_tensors(read_state_dict(ROOT / "models/tiny/model.safetensors"), path, "ckpt")
    return path


def write_pictures(folder: Path) -> None:
    """Photos, prior images, digits, a mask, prompts."""
    photo = Image.effect_noise((72, 64), 60).convert("RGB")
    for name in ("photo", "PHOTOS/a", "photos/dog/a", "prior/a", "outputs/demo/photos/ball/a", "outputs/demo/prior/a"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(folder / f"{name}.png")
    mask = np.zeros((64, 72), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "digits").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / "digits/0.png")
    (folder / "labels.txt").write_text("circle\nstar\n")


@pytest.fixture
def here(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, which is the working directory; the small model is known by its weights, as v1 is."""
    from ldm import identify

    folder = tmp_path / "here"
    folder.mkdir()
    write_stand_ins(folder, tiny_checkpoint)
    write_pictures(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(identify, "CONFIGS", folder / "configs/stable-diffusion")
    monkeypatch.setattr(identify, "KNOWN", {(64, 4, 128): ("v1-inference.yaml",)})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


PATHS = {"/path/to/photos": "photos/dog", "/path/to/prior/images": "prior"}


def newest(pattern: str) -> Path:
    return max(Path().glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def stand_for_names(word: str) -> str:
    """A word whose run, adapters and LoRA exist: names that a document makes up are links to what came last."""
    word = PATHS.get(word, word)
    if "*" in word:
        (word,) = glob.glob(re.sub(r"\d+-adapters$", "*-adapters", word))
    path = re.search(r"logs/[^/]+(/checkpoints/[^/:]+)?", word)
    if path is None:
        return word
    run = Path(*Path(path[0]).parts[:2])
    if not run.exists():
        run.symlink_to(newest("logs/*_*").resolve())
    if path[1] and not Path(path[0]).exists():
        made_up, kind = Path(path[0]), path[0].rpartition("-")[2]
        made_up.symlink_to(newest(f"{run}/checkpoints/*-{kind}").resolve())
    return word


def files() -> dict[Path, int]:
    """When each file here was written."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}


@cache
def program(script: str) -> Callable[[list[str]], Any]:
    return main_of(script)


def run_here(document: str) -> list[tuple[Command, Short]]:
    """A document's commands that no other test runs."""
    return [(command, entry) for command in commands(document) if isinstance(entry := entry_of(command), Short)]


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if run_here(document)])
def test_commands_run(document: str, here: Path) -> None:
    for command, entry in run_here(document):
        script, arguments = command.program
        before = files()
        words = [stand_for_names(word) for word in [*arguments, *entry.words.split()]]
        try:
            program(script)(words)
        except Exception as error:
            raise AssertionError(f"{command}: {error}") from error
        assert files() != before, f"{command} wrote nothing"
