"""A Dockerfile without a container engine: read, and its steps carried out in roots of their own.

A root is a fresh Debian by debootstrap under an overlay; steps run in it by chroot, in namespaces
of their own, as the user and with the environment that the Dockerfile says. Two things differ from
a container: Debian's own Python 3.11 takes the place of the base image's, and PyTorch with CUDA is
lent by the Python that runs the tests, where `make` has installed it from the same constraints.
"""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEBIAN = "bookworm"
MIRROR = "http://deb.debian.org/debian"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LENT = "/lent"
LARGE = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)$")
"""Distributions of PyTorch for CUDA: five gigabytes, which the tests' own Python has already."""


@dataclass(frozen=True)
class Step:
    word: str
    text: str
    options: dict[str, str]

    @property
    def words(self) -> list[str]:
        """Its arguments, of the form with brackets too."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


@dataclass
class Stage:
    base: str
    name: str
    steps: list[Step] = field(default_factory=list)

    def all(self, word: str) -> list[Step]:
        return [step for step in self.steps if step.word == word]


def read_dockerfile(path: Path = ROOT / "Dockerfile") -> tuple[dict[str, str], list[Stage]]:
    """The arguments that stand before the first stage, and the stages."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        options = {}
        while match := re.match(r"--([\w-]+)=(\S+)\s+", rest):
            options[match[1]] = match[2]
            rest = rest[match.end() :]
        step = Step(word, rest.strip(), options)
        if word == "FROM":
            base, _, name = step.text.partition(" AS ")
            stages.append(Stage(base.replace("${BASE}", arguments["BASE"]), name))
        elif stages:
            stages[-1].steps.append(step)
        else:
            assert word == "ARG"
            arguments |= dict([step.text.split("=", 1)])
    return arguments, stages


def cannot() -> str | None:
    """Why no root can be made here."""
    if os.geteuid() != 0:
        return "only root may make a root of its own"
    if missing := [p for p in ("debootstrap", "unshare", "chroot") if not shutil.which(p)]:
        return f"{missing[0]} is not installed"
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"]).returncode:
        return "this machine grants no namespaces"
    return None


def debian(folder: Path) -> str | None:
    """Makes a fresh Debian with Python in ``folder``; why it could not."""
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", DEBIAN, str(folder)]
    ran = subprocess.run([*command, MIRROR], capture_output=True, text=True)
    return None if ran.returncode == 0 else f"debootstrap failed: {ran.stdout[-500:]}"


def _pip_settings() -> tuple[dict[str, str], list[str]]:
    """What pip is told on this machine, and the paths that this names."""
    environment = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    for line in listed.splitlines():
        if match := re.match(r"(?:global|install|site|user)\.([\w-]+)='(.*)'$", line):
            key = "PIP_" + match[1].upper().replace("-", "_")
            environment.setdefault(key, match[2].replace("\\n", " "))
    environment.pop("PIP_NO_INDEX", None)
    words = [w for value in environment.values() for w in value.split()]
    # Beside an index of files lies what it links to.
    places = [Path(w.removeprefix("file://")) for w in words]
    places = [
        p.parent if w.startswith("file://") else p for p, w in zip(places, words, strict=True)
    ]
    return environment, [
        str(p) for p in places if len(p.parts) > 2 and p.is_absolute() and p.exists()
    ]


def lent_names() -> Iterator[str]:
    """Files and folders of site-packages that belong to PyTorch's distributions."""
    names = set()
    for found in importlib.metadata.distributions():
        if LARGE.match(found.metadata["Name"]):
            names |= {p.parts[0] for p in found.files or () if p.parts[0] not in ("..", ".")}
    yield from sorted(names - {"__pycache__"})


class Root:
    """The file system of one stage, from a base that all stages have in common."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._base, self._folder = base, folder
        for name in ("upper", "work", "mnt"):
            (folder / name).mkdir(parents=True)
        self._pip, self._paths = _pip_settings()
        self._site = Path(importlib.metadata.distribution("torch").locate_file(""))

    def run(
        self,
        command: list[str],
        *,
        environment: Mapping[str, str],
        user: str = "0:0",
        folder: str = "/",
        extra: str = "",
        timeout: float = 1500,
    ) -> subprocess.CompletedProcess[str]:
        """Runs ``command`` in the root; ``extra`` are shell commands before, outside of it."""
        mnt = shlex.quote(str(self._folder / "mnt"))
        layers = f"lowerdir={self._base},upperdir={self._folder}/upper,workdir={self._folder}/work"
        lines = [
            "set -e",
            f"mount -t overlay overlay -o {shlex.quote(layers)} {mnt}",
            f"mkdir -p {mnt}{LENT}",
            f"mount --bind {shlex.quote(str(self._site))} {mnt}{LENT}",
            f"mount -o remount,bind,ro {mnt}{LENT}",
            f"mount -t proc proc {mnt}/proc",
            f"mount --rbind /dev {mnt}/dev",
            f"mount -t tmpfs -o mode=1777 tmpfs {mnt}/dev/shm",
            f"cp /etc/resolv.conf /etc/hosts {mnt}/etc/",
        ]
        for path in self._paths:
            make = (
                "mkdir -p" if Path(path).is_dir() else f"mkdir -p {mnt}{Path(path).parent}; touch"
            )
            lines.append(f"{make} {mnt}{path}; mount --bind {shlex.quote(path)} {mnt}{path}")
        inner = f"cd {shlex.quote(folder)} && exec {shlex.join(command)}"
        told = " ".join(shlex.quote(f"{k}={v}") for k, v in (self._pip | environment).items())
        lines += [
            extra.replace("@", mnt),
            f"exec chroot --userspec={user} {mnt} /usr/bin/env -i {told} "
            f"/bin/sh -c {shlex.quote(inner)}",
        ]
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts"]
        return subprocess.run(
            [*namespaces, "bash", "-c", "\n".join(lines)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def path(self, inside: str) -> Path:
        """Where a file that a step wrote lies."""
        return self._folder / "upper" / inside.lstrip("/")


class Build:
    """Carries a Dockerfile out, stage by stage; ``steps`` says what was run."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._base, self._folder = base, folder
        self.steps: list[str] = []
        self.roots: dict[str, Root] = {}
        self.environment: dict[str, str] = {}
        self.user = "0:0"
        self.folder = "/"

    def run(self, stages: list[Stage]) -> Root:
        for number, stage in enumerate(stages):
            name = stage.name or str(number)
            root = self.roots[name] = Root(self._base, self._folder / name)
            self.environment, arguments = {"PATH": PATH}, {}
            self.user, self.folder = "0:0", "/"
            for step in stage.steps:
                self._carry_out(root, step, arguments)
                if step.word == "RUN" and "-m venv" in step.text:
                    self._lend(root)
        return root

    def inside(self, root: Root, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """As `docker run` and `docker exec` would start it."""
        return root.run(
            list(command),
            environment=self.environment | more,
            user=self.user,
            folder=self.folder,
            timeout=600,
        )

    def _carry_out(self, root: Root, step: Step, arguments: dict[str, str]) -> None:
        if step.word == "RUN":
            self._must(root, ["/bin/sh", "-c", step.text], arguments)
            self.steps.append(step.text)
        elif step.word == "COPY":
            self._copy(root, step)
        elif step.word == "ARG":
            arguments |= dict([step.text.split("=", 1)])
        elif step.word == "ENV":
            for pair in shlex.split(step.text):
                key, _, value = pair.partition("=")
                self.environment[key] = value.replace("$PATH", self.environment["PATH"])
        elif step.word == "WORKDIR":
            self.folder = step.text
            self._must(root, ["mkdir", "-p", step.text], {}, folder="/")
        elif step.word == "USER":
            found = self._must(root, ["id", "-u", step.text], {}, user="0:0")
            uid = found.stdout.split()[-1]
            self.user = f"{uid}:{uid}"

    def _must(
        self, root: Root, command: list[str], more: dict[str, str], **where: str
    ) -> subprocess.CompletedProcess[str]:
        ran = root.run(
            command,
            environment=self.environment | more,
            user=where.get("user", self.user),
            folder=where.get("folder", self.folder),
            extra=where.get("extra", ""),
        )
        assert ran.returncode == 0, f"{shlex.join(command)}\n{ran.stdout[-4000:]}"
        return ran

    def _copy(self, root: Root, step: Step) -> None:
        *sources, target = step.words
        if not target.startswith("/"):
            target = f"{self.folder}/{target}"
        source_root = self.roots[step.options["from"]] if "from" in step.options else None
        lines = []
        for source in sources:
            path = source_root.path(source) if source_root else ROOT / source
            into = f"@{target}"
            if path.is_dir():
                lines.append(f"mkdir -p {into} && cp -a {shlex.quote(str(path))}/. {into}/")
            else:
                lines.append(
                    f"mkdir -p $(dirname {into}x) && cp -a {shlex.quote(str(path))} {into}"
                )
        owner = step.options.get("chown", "root:root")
        self._must(
            root, ["chown", "-R", owner, target], {}, user="0:0", extra="\n".join(lines), folder="/"
        )

    def _lend(self, root: Root) -> None:
        """Lets pip find PyTorch installed, in place of five gigabytes to fetch."""
        [site] = root.path("/opt/venv/lib").glob("python3*/site-packages")
        for name in lent_names():
            (site / name).symlink_to(f"{LENT}/{name}")
