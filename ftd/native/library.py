"""Compiles kernels.c with the machine's C compiler, once, and calls into it.

The library lies beside the decoded pixels in the node's cache (``ftd.data.cache``), under a name
that says source, compiler, flags and processor: all processes of a node share one, another
processor never finds it, and an edited source makes a new one.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ftd.data.cache import cache_root
from ftd.errors import UserError

SOURCE = Path(__file__).with_name("kernels.c")
TYPES = {torch.float32: "float", torch.float64: "double"}
FLAGS = [
    "-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared",
    "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros",
]  # fmt: skip
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")


class Kernels:
    """The functions of kernels.c for one floating-point type."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))

    def __call__(self, name: str, *arguments: Tensor | int) -> None:
        """Calls ``name`` with pointers to tensors and with sizes; Python's lock is let go."""
        function = getattr(self._library, name)
        if function.argtypes is None:
            function.restype = None
            function.argtypes = [
                ctypes.c_void_p if isinstance(a, Tensor) else ctypes.c_longlong for a in arguments
            ]
        function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


@cache
def kernels(dtype: torch.dtype) -> Kernels:
    """The kernels, compiled if this machine does not have them yet.

    Raises UserError where there is no C compiler or it fails.
    """
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise UserError(f"CC={os.environ['CC']!r} is no command ({error}). Correct it.") from error
    if shutil.which(compiler[0]) is None:
        raise UserError(
            f"The native backend needs a C compiler, and {compiler[0]} is not on this machine. "
            "Install gcc (or set CC), or take the backend eager."
        )
    command = [*compiler, *FLAGS, f"-DREAL={TYPES[dtype]}", str(SOURCE), "-lm"]
    folder = cache_root() / "native"
    path = folder / f"{_digest(command, len(compiler))}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the first of a node's processes compiles
                if not path.exists():
                    _compile(command, path)
        return Kernels(path)
    except OSError as error:
        raise UserError(
            f"The native backend's library cannot be kept in or loaded from {folder} ({error}). "
            "Set FTD_CACHE to another folder that can be written and run from, or take the backend "
            "eager."
        ) from error


def unavailable() -> str | None:
    """Why this machine cannot use the native backend; None if it can."""
    try:
        kernels(torch.float32)
    except UserError as error:
        return str(error)
    return None


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = _run([*command, "-o", str(made)])
        if done.returncode or not made.exists():
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise UserError(
                f"The C compiler {command[0]} failed ({said}). Install gcc, set CC to another "
                "compiler, or take the backend eager."
            )
        with made.open("rb") as file:
            os.fsync(file.fileno())  # half a library is a crash without a word
        os.replace(made, path)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(
            f"The C compiler {command[0]} cannot be run ({error.strerror}). Install gcc, set CC to "
            "another compiler, or take the backend eager."
        ) from error


def _digest(command: list[str], words: int) -> str:
    """Names a library: what it is made from, by what (the first ``words``), for what."""
    version = _run([*command[:words], "--version"]).stdout
    what = [SOURCE.read_text(), " ".join(command), version, _processor()]
    return hashlib.sha256("\0".join(what).encode()).hexdigest()[:24]


def _processor() -> str:
    """The processor's model and abilities, for -march=native."""
    wanted = ("model name", "flags", "Features")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
