"""Whole sweeps: where their time goes, what of it is no work, and what the native backend saves.

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

PAIRS = 2
EAGER = ("resources.expert_backend=eager", "resources.trial_backend=eager")
IMAGENETTE = ROOT.parent / "shared" / "data" / "imagenette-160"
"""Where it lies, or $IMAGENETTE; without it that sweep is left out."""


def run() -> dict[str, Any]:
    """The digits sweep by both backends, taking turns, and the Imagenette CPU sweep once."""
    folder = Path(tempfile.mkdtemp(prefix="ftd-bench-"))
    found: dict[str, list[dict[str, Any]]] = {"native": [], "eager": [], "imagenette": []}
    try:
        for i in range(PAIRS):
            found["native"].append(measured(folder / f"native{i}", "digits"))
            found["eager"].append(measured(folder / f"eager{i}", "digits", *EAGER))
        root = Path(os.environ.get("IMAGENETTE") or IMAGENETTE)
        if root.is_dir():
            given = f"dataset.root={root}"
            found["imagenette"].append(measured(folder / "i", "imagenette-cpu", given))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"cores": len(os.sched_getaffinity(0)), "sweeps": found}


def measured(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    summary = sweep(folder, name, *overrides)
    kept = {k: summary[k] for k in ("phases", "worked", "first_report", "seconds")}
    print(name, *overrides, kept, flush=True)
    return kept


def sweep(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """The summary of a sweep of ``sweeps/``, run by its command in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ftd_ray.sweep", str(ROOT / "sweeps" / f"{name}.yaml")]
    subprocess.run(
        [*command, "output.dir=run", *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
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
    native, eager = sweeps["native"], sweeps["eager"]
    saved = [n["seconds"] / e["seconds"] for n, e in zip(native, eager, strict=True)]
    nothing = [100 * idle_wall(s) for s in native]
    unused = [100 * idle_cores(s, cores) for s in native]
    lines = [
        f"The digits sweep of `make sweep` on {cores} cores with an empty store takes "
        f"**{spread(saved, 'x {:.2f}')}** of the time",
        "with the native backend (compiled before) that it takes with the eager one. Of the wall "
        "time of the native",
        "one, once Ray runs, no expert, trial or final network is worked on in "
        f"{spread(nothing, '{:.1f} %')}; of the cores'",
        f"time {spread(unused, '{:.1f} %')} is unused, since a core also waits while the other "
        "trains what its next",
        "trial needs, and for the last trial.",
        "",
    ]
    columns = {"digits, native": native, "digits, eager": eager}
    if sweeps["imagenette"]:
        columns["Imagenette at 32 px, native"] = sweeps["imagenette"]
    lines.append("| seconds | " + " | ".join(columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")

    def row(title: str, *path: str) -> None:
        cells = []
        for found in columns.values():
            values = []
            for one in found:
                value: Any = one
                for key in path:
                    value = value[key]
                values.append(float(value))
            cells.append(spread(values, "{:.1f}") if len(values) > 1 else f"{values[0]:.1f}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    row("whole sweep", "seconds")
    row("from its start to the first report of a trial", "first_report")
    for key in native[0]["phases"]:
        row(f"wall time: {key}", "phases", key)
    row("work on experts", "worked", "experts")
    row("work on trials", "worked", "trials")
    row("of it evaluation on validation images", "worked", "evaluation")
    row("work on the final evaluation", "worked", "final")
    row("wall time with some work", "worked", "wall")
    return lines
