"""main.py as a person runs it: training, resuming, and what wrong input gets."""

from pathlib import Path

import pytest

from tests.programs import run, run_warm

SMALL_AUTOENCODER = [
    "model.params.ddconfig.ch=8", "model.params.ddconfig.ch_mult=[1,1,1]", "data.params.batch_size=2",
    "data.params.train.params.length=6", "lightning.callbacks.image_logger.params.batch_frequency=2",
    "lightning.modelcheckpoint.params.every_n_train_steps=2",
]  # fmt: skip


def main(*words):
    return run_warm("main.py", *words, CUDA_VISIBLE_DEVICES="")


def newest(directory):
    return max(Path(directory).iterdir(), key=lambda p: p.stat().st_mtime)


def weights(run):
    import torch

    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)


def test_an_autoencoder_trains_and_resumes_where_it_was(tmp_path):
    import torch

    base = ["--base", "configs/tiny/autoencoder.yaml", *SMALL_AUTOENCODER, "-t", "--scale_lr", "False"]
    whole = main(*base, "--max_steps", "4", "-n", "whole", "-l", str(tmp_path / "a"))
    assert whole.returncode == 0, whole.stderr
    first = main(*base, "--max_steps", "2", "-n", "part", "-l", str(tmp_path / "b"))
    assert first.returncode == 0, first.stderr
    run = newest(tmp_path / "b")
    assert (run / "configs" / "project.yaml").is_file()
    assert list((run / "images" / "train").glob("reconstruction*_gs-000002*.png"))
    second = main("--resume", str(run), "-t", "--scale_lr", "False", "--max_steps", "4")
    assert second.returncode == 0, second.stderr
    a, b = weights(newest(tmp_path / "a")), weights(run)
    assert a["global_step"] == b["global_step"] == 4
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--base"),
        (["--base", "nowhere.yaml"], "nowhere.yaml"),
        (["--base", "configs/tiny/autoencoder.yaml", "--learning_speed", "1"], "--learning_speed"),
        (["--base", "configs/tiny/autoencoder.yaml", "--gpus", "one"], "--gpus one"),
        (["--base", "configs/tiny/autoencoder.yaml", "--actual_resume", "no.ckpt"], "no.ckpt"),
        (["--resume", "no-such-run"], "no-such-run"),
        (["--base", "configs/tiny/autoencoder.yaml", "model.target=ldm.models.Nothing"], "ldm.models"),
        (["--base", "configs/tiny/autoencoder.yaml", "data.params.batch_size=none"], "batch_size"),
        (["--base", "configs/tiny/autoencoder.yaml", "lightning.trainer.max_stepz=1"], "max_stepz"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, message, tmp_path):
    result = main(*words, "-l", str(tmp_path))
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not list(tmp_path.rglob("*.ckpt"))


def test_help_lists_the_flags_of_the_original():
    text = run("main.py", "--help").stdout
    for flag in ("--name", "--resume", "--base", "--train", "--no-test", "--project", "--debug", "--seed", "--postfix",
                 "--logdir", "--scale_lr", "--gpus", "--actual_resume"):  # fmt: skip
        assert flag in text
