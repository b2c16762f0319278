"""Runs of training: taken up exactly, ended by signals and errors without loss, and equal to a loop written by hand."""

import multiprocessing
import os
import resource
import signal

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.modules.randomness import sample_seed
from ldm.training import plain_errors
from tests.training_runs import assert_equal, at, folder, last, load, run

EPOCH = 6  # steps: 11 batches, two a step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two and a half epochs that nothing disturbs."""
    logs = tmp_path_factory.mktemp("whole")
    run(logs, "--max_steps", 15)
    return last(logs)


@pytest.fixture(autouse=True)
def as_before():
    """Signals and limits of the test process as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, EPOCH - 1, EPOCH, 2 * EPOCH + 1])
def test_a_run_that_was_taken_up_ends_as_one_that_never_stopped(stop, tmp_path, whole, capsys):
    run(tmp_path, "--max_steps", stop)
    assert last(tmp_path)["global_step"] == stop
    run(tmp_path, "--resume", folder(tmp_path), "--max_steps", 15)
    assert_equal(last(tmp_path), whole)
    said = capsys.readouterr().out
    assert f"step {stop}, epoch {stop // EPOCH}" in said and f"lightning.trainer.max_steps: {stop} -> 15" in said


def test_moments_saved_in_another_memory_order_are_taken_up_like_the_weights(tmp_path, whole):
    run(tmp_path, "--max_steps", 13)
    content, path = last(tmp_path), folder(tmp_path) / "checkpoints" / "last.ckpt"
    moments = [m for o in content["optimizer_states"] for state in o["state"].values() for m in state.items()]
    assert any(value.ndim == 4 and not value.is_contiguous() for _, value in moments)  # as the weights: channels_last
    for optimizer in content["optimizer_states"]:
        for state in optimizer["state"].values():
            state |= {key: value.contiguous() for key, value in state.items()}
    torch.save(content, path)
    run(tmp_path, "--resume", path, "--max_steps", 15)
    assert_equal(last(tmp_path), whole)


def test_a_run_stopped_twice_at_ends_of_epochs_ends_the_same(tmp_path, whole):
    run(tmp_path, "--max_steps", EPOCH)
    for stop in (2 * EPOCH, 15):
        run(tmp_path, "--resume", folder(tmp_path), "--max_steps", stop)
    assert_equal(last(tmp_path), whole)


@pytest.mark.parametrize("batch", [0, 4, 12])
def test_a_save_within_an_accumulation_loses_and_doubles_nothing(batch, tmp_path, whole):
    saved = tmp_path / "saved.ckpt"
    run(tmp_path / "a", "--max_steps", 8, *at("on_train_batch_end", batch, "save", saved))
    assert load(saved)["place"]["total"] in (batch, batch + 1)
    resumed = folder(tmp_path / "a") / "checkpoints" / "saved.ckpt"
    saved.rename(resumed)
    run(tmp_path / "a", "--resume", resumed, "--max_steps", 15, "lightning.callbacks=null")
    assert_equal(last(tmp_path / "a"), whole)


def test_a_run_killed_between_its_last_two_writes_has_its_last_checkpoint_in_the_end(tmp_path):
    run(tmp_path, "--max_steps", 2)
    checkpoints = folder(tmp_path) / "checkpoints"
    before = (checkpoints / "last.ckpt").read_bytes()
    run(tmp_path, "--resume", folder(tmp_path), "--max_steps", 4)
    (checkpoints / "last.ckpt").write_bytes(before)
    run(tmp_path, "--resume", folder(tmp_path))
    assert_equal(last(tmp_path), load(checkpoints / "000000004.ckpt"))


def test_epochs_instead_of_steps_are_taken_up_too(tmp_path):
    run(tmp_path / "a", "lightning.trainer.max_steps=-1", "--max_epochs", 3)
    run(tmp_path / "b", "lightning.trainer.max_steps=-1", "--max_epochs", 1)
    run(tmp_path / "b", "--resume", folder(tmp_path / "b"), "--max_epochs", 3)
    a, b = last(tmp_path / "a"), last(tmp_path / "b")
    assert a["global_step"] == 3 * EPOCH
    assert_equal(a, b)


def test_loader_processes_read_on_where_the_run_was(tmp_path, whole):
    run(tmp_path, "--max_steps", EPOCH + 2, "data.params.num_workers=1")
    run(tmp_path, "--resume", folder(tmp_path), "--max_steps", 15)
    assert_equal(last(tmp_path), whole)


def test_a_learning_rate_on_the_command_line_takes_the_old_ones_place(tmp_path, capsys):
    run(tmp_path, "--max_steps", 3)
    run(tmp_path, "--resume", folder(tmp_path), "--max_steps", 8, "model.base_learning_rate=5e-4")
    content = last(tmp_path)
    assert content["lr_schedulers"][0]["base_lrs"] == [pytest.approx(5e-4)]
    group = content["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == pytest.approx(5e-4)
    assert group["lr"] == pytest.approx(5e-4 * (0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(3 / 25 * torch.pi)))))
    assert "learning rate 1.00e-03 -> 5.00e-04" in capsys.readouterr().out


def test_a_changed_batch_size_keeps_the_place_to_the_sample(tmp_path):
    run(tmp_path, "--max_steps", 2)
    assert last(tmp_path)["place"]["batches"] == 4
    words = ["data.params.batch_size=8", "--accumulate_grad_batches", 1, "--max_steps", 3]
    run(tmp_path, "--resume", folder(tmp_path), *words)
    assert last(tmp_path)["place"]["batches"] == 3 and last(tmp_path)["place"]["global_batch"] == 8


class TwoSizes(torch.utils.data.Dataset):
    """Pictures in two aspect-ratio buckets."""

    bucket_of = np.repeat([0, 1], 8)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"image": torch.zeros(*((16, 16) if index < 8 else (8, 32)), 3)}


@pytest.mark.parametrize("batch_size, told", [(2, True), (4, False)])
def test_a_changed_batch_size_with_buckets_is_told_to_mix_the_epoch(batch_size, told, tmp_path, capsys):
    words = [f"data.params.train.target={__name__}.TwoSizes", "data.params.train.params=null",
             "--limit_val_batches", 0, "--accumulate_grad_batches", 1]  # fmt: skip
    run(tmp_path, "--max_steps", 2, *words)
    run(tmp_path, "--resume", folder(tmp_path), "--max_steps", 3, f"data.params.batch_size={batch_size}")
    assert ("the rest of this epoch may show pictures again" in capsys.readouterr().out) == told


def test_a_run_keeps_its_seed_and_the_way_it_scales_its_learning_rate(tmp_path):
    run(tmp_path, "--max_steps", 1, "-s", 5)
    trainer = run(tmp_path, "--resume", folder(tmp_path), "--max_steps", 2)
    assert trainer.lightning_module.seed == 5 and trainer.lightning_module.learning_rate == 1e-3
    trainer = run(tmp_path, "--resume", folder(tmp_path), "--max_steps", 3, "-s", 6)
    assert trainer.lightning_module.seed == 6


def test_resume_without_a_value_begins_a_run_or_takes_it_up(tmp_path):
    words = ["--base", "benchmarks/kill.yaml", "-n", "named", "--scale_lr", "False", "lightning.trainer.logger=false"]
    run(tmp_path, *words, "--max_steps", 2, "--resume")
    run(tmp_path, *words, "--max_steps", 4, "--resume")
    assert last(tmp_path)["global_step"] == 4


@pytest.mark.parametrize("keep, names", [(1, ["000000004"]), (2, ["000000003", "000000004"]), (0, [])])
def test_old_checkpoints_are_pruned(keep, names, tmp_path):
    settings = [
        f"lightning.modelcheckpoint.params.{k}={v}" for k, v in (("save_top_k", keep), ("every_n_train_steps", 1))
    ]
    run(tmp_path, "--max_steps", 3, *settings)
    checkpoints = folder(tmp_path) / "checkpoints"
    (checkpoints / "000000001.ckpt").touch()  # as a kill between writing and pruning leaves one
    os.utime(checkpoints / "000000001.ckpt", (0, 0))
    (checkpoints / "mine.ckpt").touch()
    (checkpoints / ".last.ckpt.x.tmp").touch()
    run(tmp_path, "--resume", checkpoints / "last.ckpt", "--max_steps", 4)
    left = {path.name for path in checkpoints.iterdir()}
    expected = {"last.ckpt", "mine.ckpt", *(f"{name}.ckpt" for name in names)}
    assert left == (expected if keep else expected | {"000000001.ckpt"})


# ---- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, hook, batch, code",
    [("SIGTERM", "on_train_batch_start", 14, 143), ("SIGINT", "on_validation_batch_start", 15, 130)],
)
def test_a_signal_saves_and_ends_the_run(name, hook, batch, code, tmp_path, whole):
    with pytest.raises(SystemExit) as left:
        run(tmp_path, "--max_steps", 15, "lightning.modelcheckpoint.params.every_n_train_steps=100",
            *at(hook, batch, "signal", name))  # fmt: skip
    assert left.value.code == code
    assert last(tmp_path)["global_step"] == 8
    run(tmp_path, "--resume", folder(tmp_path), "lightning.callbacks=null")
    assert_equal(last(tmp_path), whole)


def test_a_signal_may_save_and_go_on_or_leave_without_saving(tmp_path):
    words = [
        "lightning.modelcheckpoint.params.every_n_train_steps=100",
        *at("on_train_batch_start", 4, "signal", "SIGUSR1"),
    ]
    run(tmp_path / "a", "--max_steps", 4, "--on_signal", "continue", *words)
    assert last(tmp_path / "a")["global_step"] == 4
    with pytest.raises(SystemExit) as left:
        run(tmp_path / "b", "--max_steps", 4, "--on_signal", "exit", *words)
    assert left.value.code == 138 and not list((tmp_path / "b").rglob("*.ckpt"))


def test_last_is_written_when_it_is_due_though_the_monitored_number_is_unknown(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "--max_steps", 9, "model.params.monitor=val/loss", "--limit_val_batches", 0,
            "--on_signal", "exit", *at("on_train_batch_start", 8, "signal", "SIGTERM"))  # fmt: skip
    assert last(tmp_path)["global_step"] == 4


# ---- what goes wrong ----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(tmp_path):
    run(tmp_path, "--max_steps", 2)
    with pytest.raises(UserError, match=r"finite.*last good checkpoint is .*last\.ckpt"):
        run(tmp_path, "--resume", folder(tmp_path), "model.base_learning_rate=1e32", "--max_steps", 9)
    content = last(tmp_path)
    assert content["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path):
    with pytest.raises(UserError, match=r"000000004\.ckpt' cannot be written: File too large.*last\.ckpt"):
        run(tmp_path, "--max_steps", 9, *at("on_train_batch_start", 6, "file_limit", 100_000))
    left = {path.name for path in (folder(tmp_path) / "checkpoints").iterdir()}
    assert left == {"last.ckpt", "000000002.ckpt"}
    assert last(tmp_path)["global_step"] == 2


class Deadly(torch.utils.data.Dataset):
    """Ends the process that reads its third batch."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"image": torch.zeros(16, 16, 3)}


def test_a_dead_loader_process_is_one_line(tmp_path):
    words = [
        f"data.params.train.target={__name__}.Deadly",
        "data.params.train.params=null",
        "data.params.num_workers=1",
    ]
    with pytest.raises(UserError, match="loader process died.*--resume"):
        run(tmp_path, "--max_steps", 9, "--accumulate_grad_batches", 1, *words, "--limit_val_batches", 0)


def test_so_is_one_that_dies_while_it_hands_over_a_batch():
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(UserError, match="loader process died.*--resume"), plain_errors():
        ours.recv()
    with pytest.raises(BrokenPipeError), plain_errors():
        raise BrokenPipeError


@pytest.mark.parametrize(
    "words, message",
    [
        (["lightning.logger=wandb", "lightning.trainer.logger=true"], "wandb"),
        (["lightning.logger=paper", "lightning.trainer.logger=true"], "paper"),
        (["--strategy", "deepspeed"], "(?i)deepspeed"),
        (["lightning.modelcheckpoint.params.every_n_step=2"], "modelcheckpoint.*every_n_step"),
        (["--strategy", "twins"], "twins"),
        (["model.params.min_snr_gamma=-1"], "min_snr_gamma"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, *words)
    assert not list(tmp_path.rglob("*.ckpt"))


# ---- the training itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_run_equals_a_loop_written_by_hand(precision, tmp_path):
    trainer = run(tmp_path, "--max_steps", 4, "--precision", precision, "--limit_val_batches", 0)
    model = trainer.lightning_module
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    start = run(tmp_path / "start", "--precision", precision, "--max_steps", 0).lightning_module
    assert any(not torch.equal(value, trained[name]) for name, value in start.state_dict().items())
    parameters = list(start.model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    batches = iter(start.trainer.datamodule.loader("train"))
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (0.1 + 0.18 * step)  # the warm-up's line
        for micro in (2 * step, 2 * step + 1):
            torch.manual_seed(sample_seed(start.seed, "global", micro, 0))
            batch = next(batches)
            start.batches_seen = micro
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = start.train().shared_step(batch, start.step_random(4))[0]
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.99, (2 + step) / (11 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, parameters, strict=True)]
    for name, parameter in start.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), trained[f"model.{name}"], rtol=1e-3, atol=5e-5)
    shadows = [trained[f"model_ema.{name.replace('.', '')}"] for name, _ in start.model.named_parameters()]
    for mine, theirs in zip(average, shadows, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=5e-5)
