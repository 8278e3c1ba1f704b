"""A whole sweep: where the time of ``make sweep`` goes, and what of it is no work.

Work is on experts, trials and the fresh networks of the final evaluation. The rest, from the moment
that Ray runs to the summary, is the start of processes, asking, reporting, MLflow and pictures; the
cores' time counts cores that wait for others too, such as for the last trial.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, spread

SWEEPS = 2


def run() -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="ftd-bench-"))
    sweeps = []
    try:
        for i in range(SWEEPS):
            summary = sweep(folder / str(i))
            sweeps.append({k: summary[k] for k in ("phases", "worked")})
            print(sweeps[-1], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"cores": len(os.sched_getaffinity(0)), "sweeps": sweeps}


def sweep(folder: Path, *overrides: str) -> dict[str, Any]:
    """The summary of the digits sweep, run by its command in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ftd_ray.sweep", str(ROOT / "sweeps" / "digits.yaml")]
    subprocess.run(
        [*command, "output.dir=run", *overrides],
        cwd=folder,
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return dict(json.loads((folder / "run" / "summary.json").read_text()))


def wall(found: dict[str, Any]) -> float:
    """Seconds since Ray runs."""
    return float(sum(v for k, v in found["phases"].items() if k != "start of Ray"))


def idle_wall(found: dict[str, Any]) -> float:
    """The share of the wall time in which nothing was worked on."""
    return 1 - found["worked"]["wall"] / wall(found)


def idle_cores(found: dict[str, Any], cores: int) -> float:
    """The share of the cores' time that went into no work."""
    worked = sum(found["worked"][k] for k in ("experts", "trials", "final"))
    return float(1 - worked / (cores * wall(found)))


def render(results: dict[str, Any]) -> list[str]:
    cores, sweeps = results["cores"], results["sweeps"]
    nothing = [100 * idle_wall(s) for s in sweeps]
    unused = [100 * idle_cores(s, cores) for s in sweeps]
    lines = [
        f"The digits sweep of `make sweep` on {cores} cores with an empty store. Share of the wall "
        "time, once Ray runs, in which",
        f"no expert, trial or final network is worked on: **{spread(nothing, '{:.1f} %')}**. Share "
        "of the cores' time:",
        f"{spread(unused, '{:.1f} %')}, since a core also waits while the other trains what its "
        "next trial needs, and for the last trial.",
        "",
        "| | seconds |",
        "|---|---|",
    ]
    for title, part in (("wall time", "phases"), ("work of", "worked")):
        for key in sweeps[0][part]:
            name = "wall time with some work" if key == "wall" else f"{title}: {key}"
            lines.append(f"| {name} | {spread([s[part][key] for s in sweeps], '{:.1f}')} |")
    return lines
