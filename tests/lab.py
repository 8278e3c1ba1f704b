"""A room of machines on this one: a desk and hosts on a private bridge, all made of namespaces.

Every host has a network, processes, mounts, a name, shared memory and a home of its own, and
answers ssh; its home outlives its power. Nothing has a way out of the room. The namespaces are
held by processes that the kernel kills with the process that made them, whatever that dies of;
the bridge, its cables and all mounts are in them, so nothing is left to clear up.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil
from ray_helpers import wait_until

INIT = Path(__file__).with_name("lab_init.py")
TOOLS = (
    "setpriv",
    "unshare",
    "nsenter",
    "mount",
    "ip",
    "bash",
    "pgrep",
    "ssh",
    "ssh-keygen",
    "sshd",
)

ISOLATED = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--pid", "--mount", "--uts", "--ipc"),
    *("--fork", "--kill-child", "--mount-proc"),
)
"""Runs a command as process 1 of a host; both die with the process that started them."""

TRIAL = """
ip link add name room type bridge
ip link add name cable type veth peer name eth0
mount -t tmpfs tmpfs /run
"""
"""What making a host takes."""

NETWORK = "10.77.0"
DESK = f"{NETWORK}.1"
BRIDGE = "room"
HOME = Path("/root")

ACCOUNT = "root:*:20000::::::\n"
"""A password that nobody has: sshd without PAM refuses an account that is locked."""

SSHD = f"""
HostKey {HOME}/.ssh/host_key
AuthorizedKeysFile {HOME}/.ssh/authorized_keys
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
Subsystem sftp internal-sftp
"""


def lacking() -> str | None:
    """Why this machine cannot hold the room; None when it can."""
    if os.geteuid() != 0:
        return "hosts made of namespaces take root"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed here: {', '.join(absent)}"
    tried = subprocess.run(
        [*ISOLATED, "sh", "-ec", TRIAL], stderr=subprocess.PIPE, text=True, timeout=60
    )
    if tried.returncode:
        return f"this machine grants no hosts made of namespaces: {tried.stderr.strip()}"
    return None


class Host:
    """A machine of the room; ``environment`` is that of all who log in, and of what is run here.

    What is run here finds ``programs`` too.
    """

    def __init__(
        self, name: str, address: str, disk: Path, environment: Mapping[str, str], programs: Path
    ):
        self.name = name
        self.address = address
        self.card = "02:00:" + ":".join(f"{int(n):02x}" for n in address.split("."))
        """Its network card's own address, as which others know it after a boot, too."""
        self.home = disk / HOME.relative_to("/")
        self.environment = {
            "HOME": str(HOME),
            "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            **environment,
        }
        self._profile = "".join(f"export {k}='{v}'\n" for k, v in environment.items())
        self._disk = disk
        self._holder: subprocess.Popen[str] | None = None
        self.pid = 0
        """Of its process 1, as seen from this machine."""

    def furnish(self, hosts: str, key: Path) -> None:
        """Writes its disk: the names of all hosts, and the one key that opens and is opened."""
        ssh = self.home / ".ssh"
        ssh.mkdir(parents=True, exist_ok=True)
        (self._disk / "hosts").write_text(hosts)
        (self._disk / "shadow").write_text(ACCOUNT)
        for name in ("host_key", "id_ed25519"):
            shutil.copy(key, ssh / name)
        shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
        (ssh / "sshd_config").write_text(SSHD)
        (self.home / ".bashrc").write_text(self._profile)  # read by all that the launcher runs

    @property
    def is_on(self) -> bool:
        return self._holder is not None

    def start(self) -> None:
        """Power, without a network."""
        kept = {sys.prefix, sys.base_prefix}
        with open(self._disk / "console.txt", "a") as console:
            self._holder = subprocess.Popen(
                [*ISOLATED, sys.executable, "-I", str(INIT), self.name, str(self._disk), *kept],
                stdout=subprocess.PIPE,
                stderr=console,
                text=True,
            )
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline()
        assert said == "ready\n", (self._disk / "console.txt").read_text()
        [first] = psutil.Process(self._holder.pid).children()
        self.pid = first.pid

    def stop(self) -> None:
        """Ends all that runs on it at once, without a word."""
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate(timeout=60)
            wait_until("the end of a host", lambda: not psutil.pid_exists(self.pid), seconds=60)
            self._holder, self.pid = None, 0

    def words(self, command: Sequence[str]) -> list[str]:
        """What runs ``command`` on this host."""
        spaces = ("--net", "--pid", "--mount", "--uts", "--ipc")
        enter = ["nsenter", "--target", str(self.pid), *spaces, f"--wdns={HOME}"]
        variables = (f"{k}={v}" for k, v in self.environment.items())
        return [*enter, "env", "--ignore-environment", *variables, *command]

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            self.words(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def check(self, *command: str, timeout: float = 120) -> str:
        """What a command prints that has to succeed."""
        ran = self.run(*command, timeout=timeout)
        said = f"{self.name}: {' '.join(command)}\n{ran.stdout}{ran.stderr}"
        assert ran.returncode == 0, said
        return ran.stdout

    def spawn(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """A command that goes on, with what it says in ``log``; it ends with the host."""
        with open(log, "ab") as said:
            return subprocess.Popen(
                self.words(command), stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )

    def processes(self) -> list[psutil.Process]:
        """All that runs on it, but for process 1 and its ssh."""
        if not self.is_on:
            return []
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        return [
            p for p in psutil.process_iter(["name"])
            if p.pid != self.pid and p.info["name"] != "sshd" and namespace(p.pid) == space
        ]  # fmt: skip


def namespace(pid: int) -> str | None:
    """That of a process's own number; None when the process has ended."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return None


class Room:
    """A desk, where one sits and where services run, and hosts; ends with its ``with`` block.

    Environments are given by the hosts' names. All of them know each other by name, and one key
    opens every door. ``programs`` is a folder of this Python's, or one that is beside it.
    """

    def __init__(
        self,
        folder: Path,
        hosts: Mapping[str, Mapping[str, str]],
        desk: Mapping[str, str] | None = None,
        programs: Path = Path(sys.executable).parent,
    ):
        self._folder = folder
        self._all = [Host("desk", DESK, folder / "desk", desk or {}, programs)]
        for i, (name, variables) in enumerate(hosts.items(), start=2):
            self._all.append(Host(name, f"{NETWORK}.{i}", folder / name, variables, programs))
        self.desk, *self.hosts = self._all

    def __enter__(self) -> Self:
        key = self._folder / "key"
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
        subprocess.run(make, check=True, timeout=60)
        names = ("127.0.0.1 localhost", *(f"{h.address} {h.name}" for h in self._all))
        for host in self._all:
            host.furnish("\n".join(names) + "\n", key)
        try:
            self.desk.start()
            self._network(self.desk, f"link add {BRIDGE} type bridge", *self._up(self.desk, BRIDGE))
            for host in self.hosts:
                self.power_on(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in reversed(self._all):
            host.stop()

    def power_on(self, host: Host) -> None:
        """Boots a host and waits until it lets one in."""
        host.start()
        self._network(
            self.desk,
            f"link add {host.name} type veth peer name eth0 address {host.card} netns {host.pid}",
            f"link set {host.name} master {BRIDGE} up",
        )
        self._network(host, *self._up(host, "eth0"))
        options = ("StrictHostKeyChecking=no", "LogLevel=ERROR", "ConnectTimeout=2")
        ssh = ("ssh", *(f"-o{option}" for option in options), host.name, "true")
        wait_until(
            f"{host.name} by ssh", lambda: self.desk.run(*ssh).returncode == 0, seconds=60, every=1
        )

    def power_off(self, host: Host) -> None:
        """Takes the power away: nobody hears that its connections end."""
        self._network(self.desk, f"link delete {host.name}")
        host.stop()

    def _up(self, host: Host, device: str) -> Iterator[str]:
        yield f"address add {host.address}/24 dev {device}"
        yield f"link set {device} up"
        yield "link set lo up"

    def _network(self, host: Host, *lines: str) -> None:
        """Runs lines of ``ip`` in a host's network."""
        subprocess.run(
            ["nsenter", f"--net=/proc/{host.pid}/ns/net", "ip", "-batch", "-"],
            input="\n".join(lines),
            check=True,
            text=True,
            timeout=60,
        )
