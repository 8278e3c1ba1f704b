"""The room that the lab stands in: what its hosts see of each other, and that nothing is left."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from lab import Host, Room, lacking, namespace
from ray_helpers import wait_until

pytestmark = pytest.mark.heavy

MAKES_A_ROOM = """
import sys, time
from pathlib import Path
from lab import Room
with Room(Path(sys.argv[1]), {"one": {}}) as room:
    print(*(h.pid for h in (room.desk, *room.hosts)), flush=True)
    time.sleep(600)
"""


def links() -> list[str]:
    return sorted(os.listdir("/sys/class/net"))


def mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


@pytest.fixture(autouse=True)
def _granted() -> None:
    if reason := lacking():
        pytest.skip(reason)


@pytest.fixture
def room(tmp_path) -> Room:
    with Room(tmp_path, {"one": {"GREETING": "good morning"}, "two": {}}) as room:
        yield room


def by_ssh(there: str, command: str) -> tuple[str, ...]:
    return ("ssh", "-o", "StrictHostKeyChecking=no", "-o", "ConnectTimeout=3", there, command)


def test_hosts_open_to_each_other_by_name_and_know_their_environment(room):
    one, two = room.hosts
    command = "hostname; bash --login -c -i 'source ~/.bashrc; echo $GREETING'"
    assert two.check(*by_ssh("one", command)).split("\n")[:2] == ["one", "good morning"]
    assert one.check("hostname") == "one\n"


def test_host_has_processes_disks_and_a_network_of_its_own(room):
    one, two = room.hosts
    one.check("sh", "-c", "touch /tmp/mine /root/mine /run/mine /dev/shm/mine")
    for folder in ("/tmp", "/root", "/run", "/dev/shm"):
        assert two.run("test", "-e", f"{folder}/mine").returncode == 1
        assert not Path(folder, "mine").exists()
    assert one.check("sh", "-c", "ls /sys/class/net").split() == ["eth0", "lo"]
    assert one.processes() == []
    sleeper = one.spawn("sleep", "600", log=Path(os.devnull))
    wait_until("a process", lambda: [p.name() for p in one.processes()] == ["sleep"], seconds=20)
    assert two.processes() == [] and sleeper.poll() is None


def test_nothing_in_the_room_has_a_way_out(room):
    for host in (room.desk, *room.hosts):
        routes = host.check("ip", "route").splitlines()
        assert [r.split()[0] for r in routes] == ["10.77.0.0/24"]


def test_host_without_power_is_silent_and_boots_with_its_home_only(room):
    one, two = room.hosts
    one.check("sh", "-c", "echo kept > /root/mine; touch /tmp/mine")
    room.power_off(one)
    assert not one.is_on and one.processes() == []
    silent = two.run(*by_ssh("one", "true"))
    assert silent.returncode == 255
    assert "timed out" in silent.stderr or "No route" in silent.stderr  # and not: refused, closed
    room.power_on(one)
    assert two.check(*by_ssh("one", "cat /root/mine")) == "kept\n"
    assert one.run("test", "-e", "/tmp/mine").returncode == 1


def test_nothing_is_left_of_a_room(tmp_path):
    before = links(), mounts()
    with Room(tmp_path, {"one": {}}) as room:
        hosts: list[Host] = [room.desk, *room.hosts]
        spaces = {namespace(h.pid) for h in hosts}
        hosts[1].spawn("sleep", "600", log=Path(os.devnull))
        assert (links(), mounts()) == before  # all of it is in namespaces
    assert not spaces & {namespace(p) for p in psutil.pids()}
    assert (links(), mounts()) == before


def test_room_dies_with_the_process_that_made_it(tmp_path):
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKES_A_ROOM, str(tmp_path)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pids = [int(p) for p in maker.stdout.readline().split()]
        assert len(pids) == 2
        spaces = {namespace(p) for p in pids}
        assert len(spaces) == 2 and None not in spaces
    finally:
        maker.kill()
        maker.wait(timeout=60)
    wait_until(
        "the end of a room",
        lambda: not spaces & {namespace(p) for p in psutil.pids()},
        seconds=60,
    )
