"""What benchmarks share: the machine, figures with their spread, the files that they end in."""

import json
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results.json"

HEAD = """\
# Benchmarks

Written by `make bench` (`make bench ARGS=segments` measures one part and keeps the others).
Figures are medians with the smallest and the largest. Variants that are compared take turns in
one run, so that a machine whose speed drifts drifts for all of them.
"""


def machine() -> dict[str, Any]:
    """The conditions of a measurement."""
    return {
        "processor": processor(),
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "ray": version("ray"),
        "pyarrow": version("pyarrow"),
        "date": time.strftime("%Y-%m-%d"),
    }


def conditions(m: dict[str, Any]) -> str:
    """The machine in a line."""
    return (
        f"{m['processor']}, {m['cpus']} CPUs, {m['memory_gib']} GiB, Python {m['python']}, "
        f"torch {m['torch']}, Ray {m['ray']}, pyarrow {m['pyarrow']}, {m['date']}."
    )


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
    """What was measured before: part -> {"machine": ..., "results": ...}."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
