"""Runs killed and taken up; two processes against one; the README's lines for torchrun, two machines and Slurm."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.kill import CONFIG, KillTest, differences, free_port, kill, last_checkpoint, ranks, start, starter, wait
from ldm.data.latents import encode_dataset
from ldm.errors import UserError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config, load_yaml

SMALL = ["--max_steps", "8", "lightning.trainer.val_check_interval=3"]
README = Path("README.md")


@pytest.mark.parametrize("processes, moments", [(1, [2, 0.6]), (2, [2])])
def test_killed_runs_end_as_one_that_never_was(processes, moments, tmp_path):
    test = KillTest(tmp_path, processes, SMALL)
    result = test.run("killed", moments)
    assert result.kills and result.in_saves and not result.different


def test_two_processes_train_as_one_with_the_same_samples_a_batch(tmp_path):
    words = [
        "--base",
        CONFIG,
        "model.params.unet_config.params.dropout=0",
        *SMALL,
        "-t",
        "--scale_lr",
        "False",
        "-n",
        "run",
    ]
    contents = []
    for processes, batch_size in ((1, 4), (2, 2)):
        logs = tmp_path / str(processes)
        logs.mkdir()
        words_here = [*words, f"data.params.batch_size={batch_size}", "-l", logs]
        contents.append(ended_well(start(starter(), words_here, logs / "log", ranks(processes)), logs))
    one, two = contents
    assert two["place"]["global_batch"] == 4
    outputs = {name: output(state) for name, state in {"new": None, "one": one, "two": two}.items()}
    learned = (outputs["one"] - outputs["new"]).abs().mean()
    assert (outputs["one"] - outputs["two"]).abs().mean() < 1e-3 * learned


@torch.no_grad()
def output(content):
    """What a run's network says to a noisy picture: weights themselves may differ where the loss does not see them."""
    torch.manual_seed(0)
    model = instantiate_from_config(load_yaml(CONFIG).model).eval()
    if content is not None:
        model.load_state_dict(content["state_dict"])
    return model.apply_model(torch.randn(2, 3, 16, 16), torch.tensor([10, 60]))


class Numbers:
    """Seven pictures, of which the one that is `broken` cannot be read."""

    def __init__(self, broken):
        self.broken = broken

    def __len__(self):
        return 7

    def __getitem__(self, index):
        if index == self.broken:
            raise UserError(f"picture {index} is broken")
        return {"image": np.full((2, 2, 1), index, np.float32), "name": str(index)}


class Counts(torch.nn.Module):
    """A first stage that gives pictures back, and counts them."""

    seen = 0

    def encode(self, x):
        self.seen += len(x)
        return DiagonalGaussianDistribution(x.expand(-1, 2, -1, -1))


def encode_and_keep(env, path, broken):
    os.environ.update(env)
    torch.distributed.init_process_group("gloo")
    first_stage = Counts()
    try:
        data = encode_dataset(Numbers(broken), first_stage, batch_size=2)
        torch.save({"seen": first_stage.seen, "samples": [data[i] for i in range(7)]}, path)
    except UserError as error:
        path.write_text(str(error))


@pytest.mark.parametrize("broken", [None, 3])
def test_two_processes_share_the_encoding(broken, tmp_path):
    context = starter()
    started = [context.Process(target=encode_and_keep, args=(env, tmp_path / env["RANK"], broken)) for env in ranks(2)]
    for process in started:
        process.start()
    assert wait(started, 60) == [0, 0]
    if broken is not None:
        assert {(tmp_path / rank).read_text() for rank in "01"} == {"picture 3 is broken"}
        return
    found = [torch.load(tmp_path / rank) for rank in "01"]
    assert [content["seen"] for content in found] == [4, 3]
    for content in found:
        assert [sample["name"] for sample in content["samples"]] == list("0123456")
        assert [float(sample["moments"].mean()) for sample in content["samples"]] == list(range(7))


def test_a_signal_to_one_of_two_processes_ends_both_after_the_same_step(tmp_path):
    words = ["--base", CONFIG, "-t", "--scale_lr", "False", "-n", "run", "--max_steps", "10000", "-l", tmp_path]
    started = start(starter(), words, tmp_path / "log", ranks(2))
    try:
        until(lambda: list(tmp_path.glob("*/checkpoints/last.ckpt")), started)
        os.kill(started[1].pid, signal.SIGTERM)
        assert wait(started, 60) == [143, 143]
    finally:
        kill(started)
    assert "saved" in (tmp_path / "log").read_text()


def test_a_process_that_is_gone_ends_the_others_with_one_line(tmp_path):
    words = ["--base", CONFIG, "-t", "--scale_lr", "False", "-n", "run", "--max_steps", "10000", "-l", tmp_path]
    started = start(starter(), words, tmp_path / "log", ranks(2))
    try:
        until(lambda: list(tmp_path.glob("*/checkpoints/last.ckpt")), started)
        os.kill(started[1].pid, signal.SIGKILL)
        assert wait(started, 60) == [2, -signal.SIGKILL]
    finally:
        kill(started)
    said = (tmp_path / "log").read_text()
    assert "error: training: another process of the run is gone" in said and "Traceback" not in said


def until(condition, started):
    """Wait for a condition, while processes run."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and all(process.exitcode is None for process in started)
        time.sleep(0.02)


# ---- the README's lines -------------------------------------------------------------------------------------


def lines_with(word):
    """The README's blocks of code that hold a word."""
    blocks = [block for block in re.findall(r"```\w*\n(.*?)```", README.read_text(), re.S) if word in block]
    assert blocks, f"README.md has no block with {word}"
    return blocks[0]


def as_here(command, logs):
    """A line of the README with the smallest model, on the CPU, for a few steps."""
    small = f"--base {CONFIG} --accelerator cpu --max_steps 3 --scale_lr False -l {logs}"
    changed = command.replace("--base configs/tiny/diffusion.yaml", small).replace("machine0", "127.0.0.1")
    assert small in changed
    return changed


def ended_well(started, logs):
    """Wait for processes that are to end with 0, and give the last checkpoint."""
    codes = wait(started, 120)
    assert not any(codes), (codes, (logs / "log").read_text()[-3000:])
    return last_checkpoint(logs)


def test_the_line_for_torchrun(tmp_path):
    (line,) = [
        line for line in lines_with("torchrun --nproc_per_node 2 main.py").splitlines() if line.startswith("torchrun")
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": path}
    command = ["bash", "-c", as_here(line, tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stderr
    content = last_checkpoint(tmp_path)
    assert content["global_step"] == 3 and content["place"]["global_batch"] == 8


def test_the_line_for_two_machines(tmp_path):
    (line,) = [line for line in lines_with("NODE_RANK").splitlines() if "NODE_RANK=0" in line]
    words = shlex.split(as_here(line, tmp_path))
    env = dict(word.split("=") for word in words[: words.index("python")]) | {"MASTER_PORT": free_port()}
    machines = [env, env | {"NODE_RANK": "1"}]
    started = start(starter(), words[words.index("main.py") + 1 :], tmp_path / "log", machines)
    assert ended_well(started, tmp_path)["place"]["global_batch"] == 8


SRUN = """#!/bin/bash
echo "$@" > {folder}/words && mv {folder}/words {folder}/asked
until [ -e {folder}/answer ]; do sleep 0.05; done
exit $(cat {folder}/answer)
"""


class Slurm:
    """Runs a batch script whose srun asks the test for its tasks, each standing in for a machine."""

    def __init__(self, script, folder):
        self.script, self.folder = script, folder
        self.nodes, per_node = (re.search(rf"--{word}=(\d+)", script)[1] for word in ("nodes", "ntasks-per-node"))
        assert per_node == "1"
        for name, text in {"srun": SRUN, "scontrol": '#!/bin/bash\necho "$@" > {folder}/requeued\n'}.items():
            (folder / name).write_text(text.format(folder=folder))
            (folder / name).chmod(0o755)

    def job(self, out_of_time):
        """The script's exit code; `out_of_time` sends SIGUSR1 as soon as there is a checkpoint."""
        for name in ("asked", "answer"):
            (self.folder / name).unlink(missing_ok=True)
        env = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "20017"}
        batch = subprocess.Popen(["bash", "-c", self.script], env=env)
        until((self.folder / "asked").exists, [])
        program, main, *words = shlex.split((self.folder / "asked").read_text())
        assert (program, main) == ("python", "main.py")
        common = {"SLURM_NNODES": self.nodes, "SLURM_NTASKS": self.nodes, "SLURM_NTASKS_PER_NODE": "1",
                  "SLURM_LOCALID": "0", "SLURM_JOB_ID": "20017", "SLURM_JOB_NAME": "train",
                  "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()}  # fmt: skip
        each = [common | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)} for i in range(int(self.nodes))]
        tasks = start(starter(), words, self.folder / "log", each)
        if out_of_time:
            until(lambda: list(self.folder.glob("*_big/checkpoints/last.ckpt")), tasks)
            for task in tasks:
                os.kill(task.pid, signal.SIGUSR1)
        (self.folder / "answer").write_text(str(max(wait(tasks, 120))))
        return batch.wait(60)


def test_the_script_for_slurm(tmp_path):
    script = as_here(lines_with("srun"), tmp_path)
    script = script.replace("--max_steps 3", "--max_steps 30 lightning.modelcheckpoint.params.every_n_train_steps=1")
    slurm = Slurm(script, tmp_path)
    slurm.job(out_of_time=True)
    assert (tmp_path / "requeued").read_text() == "requeue 20017\n", (tmp_path / "log").read_text()[-3000:]
    stopped_at = last_checkpoint(tmp_path)["global_step"]
    assert slurm.job(out_of_time=False) == 0, (tmp_path / "log").read_text()[-3000:]
    assert stopped_at < last_checkpoint(tmp_path)["global_step"] == 30


def test_differences_are_seen():
    a = {"x": [torch.ones(2), 1], "y": 0.5}
    assert not list(differences(a, {"x": [torch.ones(2), 1], "y": 0.5}))
    b = {"x": [torch.tensor([1.0, 1.0 + 2**-23]), 1], "y": 0.25}
    assert list(differences(a, b)) == ["x[0]", "y"]
