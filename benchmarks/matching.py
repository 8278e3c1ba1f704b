"""The matching step through one graph against the rematerialised one, side by side.

Each figure is measured in a process of its own (peak memory is a property of a process), the two
variants take turns, and the ratio is taken pair by pair, so that a machine whose speed drifts
drifts for both. Both are checked to give the same gradients first.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import ROOT, own_memory, spread
from ftd import augment
from ftd.distill import DistillConfig, draw_inner_steps
from ftd.gradients import Gradients
from ftd.matching import GRADIENTS, Match
from ftd.networks import build_network
from ftd.seeds import generator


@dataclass(frozen=True)
class Case:
    """A matching step on noise images of CIFAR's shape, 10 classes."""

    name: str
    network: str
    ipc: int
    syn_steps: int


CASES = (
    Case("IPC 1, N = 50", "ConvNetD3", 1, 50),
    Case("IPC 10, N = 30", "ConvNetD3", 10, 30),
)


def step(case: Case, gradient: str, dtype: torch.dtype = torch.float32) -> Match:
    """One matching step of a case; the same for every call and every variant."""
    network = build_network(case.network, channels=3, resolution=32, classes=10)
    gen = generator(0, "bench", case.name)
    n = 10 * case.ipc
    images = torch.randn(n, 3, 32, 32, generator=gen)
    labels = torch.arange(10).repeat_interleave(case.ipc)
    start = network.init(gen)
    target = start + 0.01 * torch.randn(network.size, generator=gen)
    config = DistillConfig(ipc=case.ipc, syn_steps=case.syn_steps)
    steps = draw_inner_steps(config, n, augment.FULL, gen, torch.device("cpu"))
    eta = torch.tensor(0.01, dtype=dtype)
    start, target, images = (t.to(dtype) for t in (start, target, images))
    return GRADIENTS[gradient](Gradients(network), start, target, images, labels, eta, steps)


def measure(case: Case, gradient: str, threads: int) -> dict[str, float]:
    """Seconds of a step after a short warm-up, and peak memory above the idle process (MiB)."""
    torch.set_num_threads(threads)
    step(Case("warm-up", case.network, 1, 2), gradient)
    idle = own_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.perf_counter()
    step(case, gradient)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": max(own_memory("VmHWM") - idle, 1.0)}


def in_a_process(case: Case, gradient: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.matching", case.name, gradient, str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return json.loads(done.stdout)


def relative_error(case: Case) -> float:
    """Largest relative difference of the two variants' gradients, at width 16 and N <= 20.

    In float64: on noise, the kinks of ReLU amplify float32's rounding in both variants alike.
    """
    small = Case(case.name, "ConvNetD3W16", case.ipc, min(case.syn_steps, 20))
    a, b = (step(small, g, torch.float64) for g in ("direct", "rematerialised"))
    pairs = ((a.grad_images, b.grad_images), (a.grad_lr, b.grad_lr))
    return max(float((x - y).norm() / x.norm()) for x, y in pairs)


def run(*, repeats: int = 3, threads: int = 2) -> dict[str, Any]:
    """Both variants of every case, taking turns."""
    rows = []
    for case in CASES:
        error = relative_error(case)
        assert error < 1e-10, f"{case.name}: the two variants differ by {error:g}"
        runs: dict[str, list[dict[str, float]]] = {g: [] for g in GRADIENTS}
        for _ in range(repeats):
            for gradient in GRADIENTS:
                runs[gradient].append(in_a_process(case, gradient, threads))
        pairs = list(zip(runs["rematerialised"], runs["direct"], strict=True))
        ratios = {what: [r[what] / d[what] for r, d in pairs] for what in ("seconds", "mib")}
        rows.append({"case": asdict(case), "relative_error": error, "runs": runs, "ratios": ratios})
        print(f"{case.name}: time x {statistics.median(ratios['seconds']):.2f}, "
              f"memory x {statistics.median(ratios['mib']):.3f}", flush=True)  # fmt: skip
    return {"threads": threads, "rows": rows}


def render(results: dict[str, Any]) -> list[str]:
    lines = [
        f"ConvNet D3, 32 x 32 x 3, 10 classes, float32, DSA on, {results['threads']} threads. "
        "Memory is the peak",
        "above the idle process. Both give the same gradients: the last column is their relative",
        "difference in float64, at width 16 and N = 20.",
        "",
        "| case | direct | rematerialised | time | memory | difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [row["case"]["name"]]
        for g in ("direct", "rematerialised"):
            seconds = spread([r["seconds"] for r in row["runs"][g]], "{:.1f} s")
            mib = spread([r["mib"] for r in row["runs"][g]], "{:.0f} MiB")
            cells.append(f"{seconds}, {mib}")
        cells.append(spread(row["ratios"]["seconds"], "x {:.2f}"))
        cells.append(spread(row["ratios"]["mib"], "x {:.3f}"))
        cells.append(f"{row['relative_error']:.0e}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":  # one measurement, in a process of its own
    name, gradient, threads = sys.argv[1:]
    chosen = next(c for c in CASES if c.name == name)
    print(json.dumps(measure(chosen, gradient, int(threads))))
