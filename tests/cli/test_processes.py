"""Runs killed and taken up; two processes against one; the README's lines for torchrun, two machines and Slurm."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.kill import CONFIG, KillTest, differences, kill, last_checkpoint, start, starter, wait
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
        codes = wait(
            start(starter(), [*words, f"data.params.batch_size={batch_size}", "-l", logs], logs / "log", processes)
        )
        assert codes == [0] * processes, (logs / "log").read_text()
        contents.append(last_checkpoint(logs))
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


def test_a_signal_to_one_of_two_processes_ends_both_after_the_same_step(tmp_path):
    words = ["--base", CONFIG, "-t", "--scale_lr", "False", "-n", "run", "--max_steps", "10000", "-l", tmp_path]
    started = start(starter(), words, tmp_path / "log", processes=2)
    try:
        until(lambda: list(tmp_path.glob("*/checkpoints/last.ckpt")), started)
        os.kill(started[1].pid, signal.SIGTERM)
        assert wait(started, 60) == [143, 143]
    finally:
        kill(started)
    assert "saved" in (tmp_path / "log").read_text()


def test_a_process_that_is_gone_ends_the_others_with_one_line(tmp_path):
    words = ["--base", CONFIG, "-t", "--scale_lr", "False", "-n", "run", "--max_steps", "10000", "-l", tmp_path]
    started = start(starter(), words, tmp_path / "log", processes=2)
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


def shell(command, path=None, **env):
    """Run a line by bash, with this Python as `python` and its programs, and `path` before them."""
    folders = [*([str(path)] if path else []), str(Path(sys.executable).parent), os.environ["PATH"]]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": ":".join(folders)} | env
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, timeout=300)


def test_the_lines_for_torchrun(tmp_path):
    (line,) = [line for line in lines_with("torchrun").splitlines() if line.startswith("torchrun")]
    result = shell(as_here(line, tmp_path))
    assert result.returncode == 0, result.stderr
    content = last_checkpoint(tmp_path)
    assert content["global_step"] == 3 and content["place"]["global_batch"] == 8


def test_the_lines_for_two_machines(tmp_path):
    (line,) = [line for line in lines_with("NODE_RANK").splitlines() if "NODE_RANK=0" in line]
    line = as_here(line, tmp_path)
    both = f"{line.replace('NODE_RANK=0', 'NODE_RANK=1')} & {line} && wait $!"
    result = shell(both)
    assert result.returncode == 0, result.stderr
    assert last_checkpoint(tmp_path)["place"]["global_batch"] == 8


SRUN = """#!{python}
import os, signal, subprocess, sys, time, glob
nodes = os.environ["SLURM_NNODES"]  # of one task each
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | dict(SLURM_PROCID=str(i), SLURM_NODEID=str(i), SLURM_LOCALID="0",
                                                         SLURM_NTASKS=nodes, SLURM_JOB_NAME="train"))
    for i in range(int(nodes))
]
if not os.path.exists("{folder}/requeued"):  # the first time: time is nearly up
    while not glob.glob("{folder}/*_big/checkpoints/*.ckpt") and tasks[0].poll() is None:
        time.sleep(0.01)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_script_for_slurm(tmp_path):
    script = as_here(lines_with("srun"), tmp_path)
    script = script.replace("--max_steps 3", "--max_steps 60 lightning.modelcheckpoint.params.every_n_train_steps=1")
    settings = dict(re.findall(r"--(nodes|ntasks-per-node)=(\d+)", script))
    env = {"SLURM_NNODES": settings["nodes"], "SLURM_NTASKS_PER_NODE": settings["ntasks-per-node"],
           "SLURM_JOB_ID": "20017", "SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN.format(python=sys.executable, folder=tmp_path))
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    first = shell(script, programs, **env)
    assert (tmp_path / "requeued").read_text() == "requeue 20017\n", first.stderr
    stopped_at = last_checkpoint(tmp_path)["global_step"]
    second = shell(script, programs, **env)
    assert second.returncode == 0, second.stderr
    assert stopped_at < last_checkpoint(tmp_path)["global_step"] == 60


def test_differences_are_seen():
    a = {"x": [torch.ones(2), 1], "y": 0.5}
    assert not list(differences(a, {"x": [torch.ones(2), 1], "y": 0.5}))
    b = {"x": [torch.tensor([1.0, 1.0 + 2**-23]), 1], "y": 0.25}
    assert list(differences(a, b)) == ["x[0]", "y"]
