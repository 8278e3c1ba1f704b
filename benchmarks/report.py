"""What benchmarks share: the machine, figures with their spread, the files that they end in."""

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results.json"

HEAD = """\
# Benchmarks

Written by `make bench` (`make bench ARGS=segments` measures one part and keeps the others).
Figures are medians with the smallest and the largest. Variants that are compared take turns in
one run, so that a machine whose speed drifts drifts for all of them; their ratios are taken pair
by pair. The textbook version is [textbook.py](textbook.py): the same numbers in plain PyTorch.
Parts that compare with it are measured on a GPU too, where there is one; other machines keep the
last GPU figures, with their date.
"""


def machine(device: str = "cpu") -> dict[str, Any]:
    """The conditions of a measurement; packages that are not there are left out."""
    found = {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
    }
    for package in ("ray", "pyarrow"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def conditions(m: dict[str, Any]) -> str:
    """The machine in a line."""
    parts = [m["gpu"]] if "gpu" in m else []
    parts += [
        m["processor"], f"{m['cpus']} CPUs", f"{m['memory_gib']} GiB",
        f"Python {m['python']}", f"torch {m['torch']}",
    ]  # fmt: skip
    parts += [
        f"{name} {m[key]}" for key, name in (("ray", "Ray"), ("pyarrow", "pyarrow")) if key in m
    ]
    return ", ".join([*parts, m["date"]]) + "."


def spread(values: Sequence[float], form: str) -> str:
    """``2.0 s (1.0 s … 3.0 s)``."""
    median = form.format(statistics.median(values))
    return f"{median} ({form.format(min(values))} … {form.format(max(values))})"


def own_memory(field: str) -> float:
    """A figure of this process's memory in MiB (Linux; getrusage's peak is the parent's too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def processor() -> str:
    """The model of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def read_results() -> dict[str, Any]:
    """What was measured before: part -> {"machine": ..., "results": ..., "gpu": the same}."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
