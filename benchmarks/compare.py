"""Our code against the textbook version (``benchmarks.textbook``), side by side.

Each figure is measured in a process of its own (peak memory is a property of a process), the
variants take turns, and the ratio is taken pair by pair, so that a machine whose speed drifts
drifts for both. A part of the benchmark gives its cases by name, and ``work(case, variant,
device)``, which prepares a case and returns what is timed.

A part's results on a device:

    {"threads": 2, "backend": "native", "differences": {what: relative},
     "rows": [{"case", "runs", "ratios"}],
     "curves": {"N": [{"x": 5, "textbook": {"seconds", "mib"}, "ours": {...}}]}}
"""

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import ROOT, conditions, own_memory, spread
from ftd.expert import Numerics

THREADS = 2
VARIANTS = ("textbook", "ours")
LIMIT_MIB = 6 * 1024
"""A curve's textbook variant stops where it would need more than this, or 0.8 of a GPU."""

Work = Callable[[Any, str, torch.device], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked of our code on a CPU: at most these shares of the textbook's, or MiB."""

    seconds: float | None = None
    mib: float | None = None
    mib_itself: float | None = None


# --- one measurement, in a process of its own -----------------------------------------------


def child(work: Work, cases: Mapping[str, Any], warm_up: Any) -> None:
    """The main function of a part's module: measures what the command line names."""
    name, variant, device = sys.argv[1:]
    print(json.dumps(measure(work, cases[name], variant, device, warm_up)))


def measure(work: Work, case: Any, variant: str, device: str, warm_up: Any) -> dict[str, float]:
    """Seconds of a case after a warm-up, and peak memory above the idle process, in MiB."""
    target = Numerics.on(device, THREADS).apply()
    on_gpu = target.type == "cuda"
    # On a GPU the first run of every shape chooses kernels. On a CPU a narrow network loads the
    # libraries, without the arrays that our code keeps for its next call: they count as peak.
    work(case if on_gpu else warm_up, variant, target)()
    timed = work(case, variant, target)
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated() / 2**20
    else:
        with suppress(OSError, AttributeError):  # what the warm-up freed goes back, with glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        idle = own_memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.perf_counter()
    timed()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else own_memory("VmHWM")
    return {"seconds": seconds, "mib": max(peak - idle, 1.0)}


def in_a_process(part: str, case: str, variant: str, device: str) -> dict[str, float]:
    command = [sys.executable, "-m", f"benchmarks.{part}", case, variant, device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout)
    return found


# --- comparisons ----------------------------------------------------------------------------


def side_by_side(
    part: str, case: str, device: str, *, repeats: int, variants: Sequence[str] = VARIANTS
) -> dict[str, Any]:
    """The variants of a case, taking turns."""
    runs: dict[str, list[dict[str, float]]] = {v: [] for v in variants}
    for _ in range(repeats):
        for variant in variants:
            runs[variant].append(in_a_process(part, case, variant, device))
    row: dict[str, Any] = {"case": case, "runs": runs, "ratios": {}}
    if len(variants) > 1:
        pairs = list(zip(runs["ours"], runs["textbook"], strict=True))
        row["ratios"] = {what: [o[what] / t[what] for o, t in pairs] for what in ("seconds", "mib")}
    medians = {
        v: f"{statistics.median(r['seconds'] for r in found):.1f} s, "
        f"{statistics.median(r['mib'] for r in found):.0f} MiB"
        for v, found in runs.items()
    }
    print(f"{device}, {case}: {medians}", flush=True)
    return row


def curve(part: str, points: Mapping[int, str], device: str) -> list[dict[str, Any]]:
    """Cases by x, each measured once; the textbook version while it stays below the limit."""
    limit = LIMIT_MIB
    if device == "cuda":
        limit = int(0.8 * torch.cuda.mem_get_info()[1] / 2**20)
    found: list[dict[str, Any]] = []
    for x, case in points.items():
        last = found[-1] if found else None
        fits = last is None or (
            "textbook" in last and last["textbook"]["mib"] * x / last["x"] <= limit
        )
        row = side_by_side(part, case, device, repeats=1, variants=VARIANTS if fits else ("ours",))
        found.append({"x": x} | {variant: runs[0] for variant, runs in row["runs"].items()})
    return found


@contextmanager
def double() -> Iterator[None]:
    """float64 everywhere, so that two orders of the same sums cannot hide a difference."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check(differences: Mapping[str, float]) -> None:
    """Raises AssertionError unless both variants give the same numbers.

    float64 is the proof. In float32 rounding decides on which side of ReLU's kink a value near 0
    falls, and what comes after differs: there the bound only catches what is wrong by far.
    """
    same = differences["float64"] < 1e-10 and differences["float32"] < 0.05
    assert same, f"ours and the textbook version do not give the same numbers: {differences}"


def relative(ours: torch.Tensor, textbook: torch.Tensor) -> float:
    """The norm of the difference, relative to the textbook's."""
    return float((ours - textbook).norm() / textbook.norm())


# --- what is shown --------------------------------------------------------------------------

Record = dict[str, Any]
"""A part's entry in results.json: machine and results, and the same of a GPU under ``gpu``."""


def table(record: Record, targets: Mapping[str, Target]) -> list[str]:
    """Time and memory of every case: the target, then both variants and their ratio a device."""
    devices = {"CPU": record["results"]}
    if "gpu" in record:
        devices["GPU"] = record["gpu"]["results"]
    header = ["case", "", "target"]
    for device in devices:
        header += [f"{device}: textbook", f"{device}: ours", f"{device}: ours ÷ textbook"]
    lines = [_row(header), _row(["---"] * len(header))]
    for row in record["results"]["rows"]:
        for what, title in (("seconds", "time"), ("mib", "memory")):
            target = targets.get(row["case"], Target())
            cells = [row["case"], title, _target(row, what, target)]
            for results in devices.values():
                same = [r for r in results["rows"] if r["case"] == row["case"]]
                cells += _figures(same[0], what) if same else [""] * 3
            lines.append(_row(cells))
    return [*lines, "", origin(record)]


def origin(record: Record) -> str:
    """Our backends; where the GPU figures come from, or that there are none."""
    said = f"Ours on the CPU: backend {record['results']['backend']}."
    gpu = record.get("gpu")
    if gpu is None:
        return f"{said} GPU figures: none yet."
    backend = gpu["results"]["backend"]
    return f"{said} GPU figures: backend {backend}; {conditions(gpu['machine'])}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _figures(row: dict[str, Any], what: str) -> list[str]:
    cells = []
    for variant in VARIANTS:
        runs = [r[what] for r in row["runs"].get(variant, ())]
        cells.append(_spread(runs, "{:.2f} s" if what == "seconds" else "{:,.0f} MiB"))
    return [*cells, _spread(row["ratios"].get(what, ()), "x {:.2f}")]


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return form.format(*values) if values else "–"
    return spread(values, form)


def _target(row: dict[str, Any], what: str, target: Target) -> str:
    """What is asked for, and whether the CPU's median reaches it."""
    share = target.seconds if what == "seconds" else target.mib
    if share is not None:
        reached = statistics.median(row["ratios"][what]) <= share
        asked = f"x {share:.2f}"
    elif what == "mib" and target.mib_itself is not None:
        reached = statistics.median(r["mib"] for r in row["runs"]["ours"]) <= target.mib_itself
        asked = f"{target.mib_itself:,.0f} MiB"
    else:
        return "–"
    return f"at most {asked}: {'reached' if reached else 'not reached'}"


COLOURS = {"textbook": "#c0392b", "ours": "#1f77b4"}
UNITS = {"seconds": "time (s)", "mib": "memory above idle (MiB)"}


def draw_curves(record: Record, path: Path, curves: Mapping[str, str]) -> None:
    """Time and memory against x, both axes logarithmic; ``curves`` are the labels of x by key."""
    from matplotlib.figure import Figure

    devices = {"CPU": (record["results"], "-")}
    if "gpu" in record:
        devices["GPU"] = (record["gpu"]["results"], "--")
    figure = Figure(figsize=(9.2, 3.4 * len(curves)), layout="constrained")
    grid = figure.subplots(len(curves), 2, squeeze=False)
    for (key, label), row in zip(curves.items(), grid, strict=True):
        for axes, (what, unit) in zip(row, UNITS.items(), strict=True):
            for device, (results, line) in devices.items():
                for variant in VARIANTS:
                    points = [p for p in results["curves"][key] if variant in p]
                    x, y = [p["x"] for p in points], [p[variant][what] for p in points]
                    name = f"{variant}, {device}"
                    axes.plot(x, y, line, color=COLOURS[variant], marker="o", ms=4, label=name)
            ticks = [p["x"] for p in record["results"]["curves"][key]]
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
            axes.set_xticks(ticks, [str(t) for t in ticks])
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if _leading(value) else "")
            axes.grid(visible=True, which="major", color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _leading(value: float) -> bool:
    """Whether a minor tick is at 2 or 5, the only ones that get a number."""
    return f"{value:e}"[0] in "25"
