"""The first process of a host of the lab: it makes the host's disks and name, and serves ssh.

python lab_init.py NAME DISK [KEPT ...]

It runs as process 1 of namespaces of its own. DISK is the folder that outlives the host's power;
every KEPT folder is seen in the host too, wherever it lies. Says ``ready`` once all is made.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

FRESH = ("/dev/shm", "/run")
"""In memory: empty after each boot."""

WIPED = "/tmp"
"""On the disk, and empty after each boot."""

HOME = "/root"
"""On the disk, and as it was left."""


def main(name: str, disk: Path, kept: list[Path]) -> None:
    socket.sethostname(name)
    mount("-t", "sysfs", "sysfs", "/sys")  # of this network
    for folder in FRESH:
        mount("-t", "tmpfs", "tmpfs", folder)
    for name_in_etc in ("hosts", "shadow"):
        mount("--bind", str(disk / name_in_etc), f"/etc/{name_in_etc}")
    shutil.rmtree(disk / WIPED[1:], ignore_errors=True)
    for folder in (HOME, WIPED):  # the second may hide the disk's own path
        mount_from(disk, Path(folder), kept)
    os.chmod(WIPED, 0o1777)
    os.makedirs("/run/sshd")
    subprocess.Popen([shutil.which("sshd"), "-D", "-f", f"{HOME}/.ssh/sshd_config"])
    os.chdir("/")
    print("ready", flush=True)
    while True:  # what the host's processes leave is reaped here
        os.wait()


def mount_from(disk: Path, folder: Path, kept: list[Path]) -> None:
    """Puts the disk's own ``folder`` in the place of the machine's, but for what is kept of it."""
    own = disk / folder.relative_to("/")
    own.mkdir(parents=True, exist_ok=True)
    for path in kept:
        if path.is_relative_to(folder):
            inside = own / path.relative_to(folder)
            inside.mkdir(parents=True, exist_ok=True)
            mount("--bind", str(path), str(inside))
    mount("--rbind", str(own), str(folder))


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(p) for p in sys.argv[3:]])
