"""A run of two machines that share nothing but a cable: two network namespaces of Linux."""

import ctypes
import os
import shlex
import shutil
import socket
import subprocess

import pytest

from benchmarks.kill import CONFIG, last_checkpoint, run_main, starter, wait

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


def run_within(name, words, env, log):
    """main.py in a namespace."""
    with open(f"/run/netns/{name}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    assert env["GLOO_SOCKET_IFNAME"] in [card for _, card in socket.if_nameindex()]
    run_main(words, env, log)


def test_two_machines_train_one_model(networks, tmp_path):
    words = f"--base {CONFIG} -t --scale_lr False --max_steps 3 --num_nodes 2 --devices 1 --accelerator cpu"
    words = [*shlex.split(words), "-l", str(tmp_path)]
    started = []
    for rank, name in enumerate(networks):
        env = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29517", "NODE_RANK": str(rank),
               "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": f"card{rank}"}  # fmt: skip
        started.append(starter().Process(target=run_within, args=(name, words, env, str(tmp_path / f"log{rank}"))))
        started[-1].start()
    assert wait(started, 240) == [0, 0], (tmp_path / "log0").read_text()[-2000:]
    content = last_checkpoint(tmp_path)
    assert content["global_step"] == 3 and content["place"]["global_batch"] == 8
