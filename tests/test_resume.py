"""Which checkpoint a run is taken up from, and what is said to have changed; runs are in test_training.py."""

import os

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from ldm import resume
from ldm.errors import UserError
from ldm.saving import AtomicCheckpointIO


def write(path, step):
    content = {"global_step": step, "optimizer_states": [], "state_dict": {"w": torch.arange(50_000.0) + step}}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def truncated(path):
    path.write_bytes(path.read_bytes()[:100_000])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def holed(path):
    content = bytearray(path.read_bytes())
    content[100_000:104_096] = bytes(4096)
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


def test_the_latest_step_counts_and_not_the_name_or_the_date(tmp_path):
    newest = write(tmp_path / "a.ckpt", 30)
    write(tmp_path / "last.ckpt", 20)
    write(tmp_path / "z.ckpt", 10)
    os.utime(newest, (0, 0))
    assert resume.newest_good(tmp_path) == newest


@pytest.mark.parametrize("damage", [truncated, zeroed, holed, emptied])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(damage, tmp_path, capsys):
    good = write(tmp_path / "000000010.ckpt", 10)
    damage(write(tmp_path / "last.ckpt", 20))
    assert resume.newest_good(tmp_path) == good
    (line,) = capsys.readouterr().out.splitlines()
    assert "last.ckpt' is damaged" in line and "going on from '000000010.ckpt'" in line
    with pytest.raises(UserError, match="damaged"):
        resume.find(str(tmp_path / "last.ckpt"))


def test_a_folder_without_a_good_checkpoint_and_weights_alone_are_refused(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint"):
        resume.find(str(run))
    torch.save({"state_dict": {}, "global_step": 1}, run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="weights alone.*--actual_resume"):
        resume.find(str(run))
    with pytest.raises(UserError, match="no run or checkpoint"):
        resume.find(str(tmp_path / "other"))


def test_what_a_checkpoint_would_run_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"global_step": 1, "optimizer_states": [], "x": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="last.ckpt"):
        resume.newest_good(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_the_newest_run_of_a_name_is_the_one_that_has_checkpoints(tmp_path):
    for date in ("2026-01-01T10-00-00", "2026-02-01T10-00-00"):
        (tmp_path / f"{date}_big" / "checkpoints").mkdir(parents=True)
        (tmp_path / f"{date}_big" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "2026-03-01T10-00-00_big" / "checkpoints").mkdir(parents=True)
    (tmp_path / "2026-04-01T10-00-00_bigger" / "checkpoints").mkdir(parents=True)
    (tmp_path / "2026-04-01T10-00-00_bigger" / "checkpoints" / "last.ckpt").touch()
    assert resume.newest_run(tmp_path, "", "big").name == "2026-02-01T10-00-00_big"
    assert resume.newest_run(tmp_path, "", "small") is None and resume.newest_run(tmp_path / "none", "", "x") is None


def test_changes_are_told_by_their_key():
    before = {"a": {"x": 1, "y": [1, 2]}, "b": "word"}
    after = {"a": {"x": 2, "y": [1, 2]}, "c": {"z": None}}
    assert list(resume.changes(before, after)) == ["a.x: 1 -> 2", "b: word -> not set", "c.z: not set -> None"]


def test_samples_a_batch_are_known_without_a_data_module():
    seen = []

    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(resume.global_batch(trainer))

    trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[Asks()],
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(BoringModel(), DataLoader(torch.randn(12, 32), batch_size=3))
    assert seen == [3, 3]
