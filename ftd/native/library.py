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
from typing import Any

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

    def __init__(self, path: Path, dtype: torch.dtype):
        self.dtype = dtype
        self._library = ctypes.CDLL(str(path))
        self._functions: dict[str, Any] = {}

    def __call__(self, name: str, *arguments: Tensor | int) -> None:
        """Calls ``name`` with pointers to tensors and with sizes; Python's lock is let go."""
        function = self._functions.get(name)
        if function is None:
            function = getattr(self._library, name)
            function.restype = None
            function.argtypes = [
                ctypes.c_void_p if isinstance(a, Tensor) else ctypes.c_longlong for a in arguments
            ]
            self._functions[name] = function
        function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


@cache
def kernels(dtype: torch.dtype) -> Kernels:
    """The kernels, compiled if this machine does not have them yet.

    Raises UserError where there is no C compiler or it fails.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        raise UserError(
            f"The native backend needs a C compiler, and {compiler[0]} is not on this machine. "
            "Install gcc (or set CC), or take the backend eager."
        )
    command = [*compiler, *FLAGS, f"-DREAL={TYPES[dtype]}", str(SOURCE), "-lm"]
    folder = cache_root() / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_digest(command)}.so"
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first of a node's processes compiles
            if not path.exists():
                _compile(command, path)
        return Kernels(path, dtype)
    except OSError as error:
        raise UserError(
            f"The native backend's library cannot be kept in {folder} ({error}). Set FTD_CACHE to "
            "a folder that can be written and run from, or take the backend eager."
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
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise UserError(
                f"The C compiler {command[0]} failed ({said}). Install gcc, set CC to another "
                "compiler, or take the backend eager."
            )
        os.replace(made, path)


def _digest(command: list[str]) -> str:
    """Names a library: what it is made from, by what, for what."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
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
