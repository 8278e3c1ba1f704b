"""What the machine can do at most, and how long a matching step takes at that pace.

The floor of a step counts the multiplications of its convolutions alone, at the speed of a large
product of matrices: by definition (each output pixel by itself), and in Winograd's domain, where
4 x 4 tiles take a quarter of them. What stands between is everything else that touches memory.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import read_results
from ftd.networks import ConvNetSpec

THREADS = 2
GRADIENT, SECOND = (2, 3), (5, 8)
"""Products of a convolution's size: of the first layer (whose input needs no gradient; in second
order it has no tangent), and of each other one."""
CASES = {"IPC 1, N = 50": (10, 50), "IPC 10, N = 30": (100, 30)}


def run() -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        ceilings = {"product of matrices, GFLOP/s": 2 * 1024**3 / fastest(lambda: a @ b) / 1e9}
        for name, layout in (
            ("channels first", torch.contiguous_format),
            ("channels last", torch.channels_last),
        ):
            x = torch.randn(25, 128, 16, 16).to(memory_format=layout)
            w = torch.randn(128, 128, 3, 3).to(memory_format=layout)
            seconds = fastest(partial(F.conv2d, x, w, padding=1))
            ceilings[f"convolution, {name}, GFLOP/s"] = 25 * 2 * 128**2 * 9 * 256 / seconds / 1e9
        big = torch.randn(2**26)
        out = torch.empty_like(big)
        ceilings["copy, GB/s"] = 8 * 2**26 / fastest(lambda: out.copy_(big)) / 1e9
    print(ceilings, flush=True)
    return {"threads": THREADS, "ceilings": ceilings}


def fastest(function: Callable[[], object], runs: int = 30) -> float:
    """Seconds of the fastest call: a ceiling is what the machine does when it is left alone."""
    best = float("inf")
    for _ in range(runs):
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return best


def operations(network: str, resolution: int, images: int, steps: int, fold: float) -> float:
    """Floating-point operations of a matching step; all layers but the first by ``fold`` less."""
    spec = ConvNetSpec.parse(network)
    first, others = (g + s for g, s in zip(GRADIENT, SECOND, strict=True))
    total = float(first * resolution**2 * 9 * 3 * spec.width)
    for level in range(1, spec.depth):
        total += others * (resolution >> level) ** 2 * 9 * spec.width**2 / fold
    return 2.0 * total * images * steps


def render(results: dict[str, Any]) -> list[str]:
    ceilings = results["ceilings"]
    lines = [f"The fastest of 30 calls, float32, {results['threads']} threads:", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name.rpartition(',')[0]} | {value:.0f}{name.rpartition(',')[2]} |"
              for name, value in ceilings.items()]  # fmt: skip
    flops = ceilings["product of matrices, GFLOP/s"] * 1e9
    lines += [
        "",
        "A matching step (ConvNet D3, 32 x 32) at the pace of the product of matrices:",
        "",
        "| case | by definition | in Winograd's domain | measured |",
        "|---|---|---|---|",
    ]
    measured = reached()
    for case, (images, steps) in CASES.items():
        floors = [operations("ConvNetD3", 32, images, steps, fold) / flops for fold in (1.0, 4.0)]
        cells = [case, *(f"{f:.2f} s" for f in floors)]
        cells.append(f"{measured[case]:.2f} s" if case in measured else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def reached() -> dict[str, float]:
    """Median seconds of our matching step, where it was measured."""
    rows = read_results().get("matching", {}).get("results", {}).get("rows", [])
    return {
        row["case"]: statistics.median(run["seconds"] for run in row["runs"]["ours"])
        for row in rows
    }
