"""A run of two machines that share nothing but a cable: two network namespaces of Linux."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from benchmarks.kill import CONFIG, last_checkpoint

NAMES = [f"machine{i}-{os.getpid()}" for i in range(2)]
ADDRESSES = ["10.213.7.1", "10.213.7.2"]


def ip(command):
    """Run `ip`; False where that takes rights that this user does not have."""
    if shutil.which("ip") is None:
        return False
    return subprocess.run(["ip", *shlex.split(command)], capture_output=True).returncode == 0


@pytest.fixture
def networks():
    """Two namespaces with one network card each, joined by a cable."""
    if not all(ip(f"netns add {name}") for name in NAMES):
        pytest.skip("network namespaces need Linux, iproute2 and root")
    try:
        assert ip(f"link add card0 netns {NAMES[0]} type veth peer name card1 netns {NAMES[1]}")
        for i, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            assert ip(f"-n {name} address add {address}/24 dev card{i}")
            assert ip(f"-n {name} link set card{i} up") and ip(f"-n {name} link set lo up")
        yield NAMES
    finally:
        for name in NAMES:
            ip(f"netns delete {name}")


def test_two_machines_train_one_model(networks, tmp_path):
    words = f"--base {CONFIG} -t --scale_lr False --max_steps 3 --num_nodes 2 --devices 1 --accelerator cpu"
    command = [sys.executable, "main.py", *shlex.split(words), "-l", str(tmp_path)]
    started = []
    for rank, name in enumerate(networks):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29517",
               "NODE_RANK": str(rank), "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": f"card{rank}"}  # fmt: skip
        with open(tmp_path / f"log{rank}", "w") as log:
            within = ["ip", "netns", "exec", name, *command]
            started.append(subprocess.Popen(within, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], (tmp_path / "log0").read_text()[-2000:]
    content = last_checkpoint(tmp_path)
    assert content["global_step"] == 3 and content["place"]["global_batch"] == 8
