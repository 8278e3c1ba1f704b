"""The outer optimiser without units against the paper's SGD, over data that neither is tuned to.

Every case takes the same space. ``rmsprop`` runs at 20 random points of it. SGD first has its two
learning rates chosen from a grid, for each case anew, and then runs at the first ten of the same
points. A point is a share of the expert's epochs, student steps, start window and rho; ``lr_img``
of rmsprop is drawn too. Accuracies are those of fresh networks on real images held out.
"""

import math
import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import HERE, ROOT
from ftd.backends import gradients_for, resolve
from ftd.data import Dataset, DatasetConfig, load
from ftd.distill import DistillConfig, distill
from ftd.errors import Diverged
from ftd.evaluate import EvaluateConfig, Protocol, evaluate, evaluate_random_real
from ftd.expert import ExpertConfig, network_for, train_expert

IMAGES = ROOT.parent / "shared" / "data"
"""Where photographs lie: Imagenette and a part of CIFAR-100, as Parquet. Without them, digits."""

SPACE: dict[str, tuple[Any, ...]] = {
    "rho": (0.0, 0.02),
    "syn_steps": (5, 10, 30),
    "expert_epochs": (1, 2, 3),
    "max_start_epoch": (1, 2, 4),
    "lr_img": (0.03, 0.1, 0.3),
}
POINTS = 20
SGD_POINTS = 10
GRID = [(img, eta) for img in (30.0, 300.0, 3000.0) for eta in (1e-7, 1e-6, 1e-5, 1e-4)]
"""(lr_img, lr_lr) among which SGD's are chosen, at ``MIDDLE``."""
MIDDLE = {"rho": 0.0, "syn_steps": 10, "expert_epochs": 2, "max_start_epoch": 2}
EPOCHS = 6
EXPERTS = 2
HELD_OUT = 1000
"""Images on which a set's networks are tested; fewer where there are not so many."""
PROTOCOL = EvaluateConfig(epochs=150)
NETWORKS = 2

DYING = {"lr_img": 1000.0, "lr_lr": 1e-5, "lr_init": 0.02}
"""SGD as it was tuned by hand for Imagenette at 32 pixels and all of its images."""
DRAWN = 6
"""Points of the picture."""
PICTURE = "outer.png"


@dataclass(frozen=True)
class Case:
    title: str
    source: str
    """digits, or the folder of a data set below ``IMAGES``."""
    network: str
    steps: int
    """Outer steps."""
    ipc: int = 1
    resolution: int | None = 32
    per_class: int | None = None
    """Training images of a class; None for all."""
    classes: int = 10


NETTE = "imagenette-160"
SMALL, SMALLEST = "ConvNetD3W16", "ConvNetD3W8"
CASES = (
    Case("digits, IPC 1", "digits", "ConvNetD2W16", 45, resolution=None),
    Case("digits, IPC 10", "digits", "ConvNetD2W16", 25, ipc=10, resolution=None),
    Case("2 classes, 20 images each", NETTE, SMALL, 45, per_class=20, classes=2),
    Case("2 classes, 100 each", NETTE, SMALL, 45, per_class=100, classes=2),
    Case("2 classes, all (about 940 each)", NETTE, SMALL, 45, classes=2),
    Case("10 classes, 20 images each", NETTE, SMALL, 45, per_class=20),
    Case("10 classes, 100 each", NETTE, SMALL, 45, per_class=100),
    Case("10 classes, all (about 940 each)", NETTE, SMALL, 45),
    Case("10 classes, 100 each, IPC 10", NETTE, SMALLEST, 12, ipc=10, per_class=100),
    Case("64 px, 10 classes, 100 each", NETTE, "ConvNetD4W16", 25, per_class=100, resolution=64),
    Case("CIFAR-100, 100 each", "cifar100-small", SMALLEST, 8, per_class=100, classes=100),
)
DRAWN_CASE = CASES[6]


def run() -> dict[str, Any]:
    """Every case whose images are there, by as many processes as there are processors."""
    folder = Path(tempfile.mkdtemp(prefix="ftd-bench-"))
    workers = len(os.sched_getaffinity(0))
    try:
        with ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_begin, initargs=(str(folder),)
        ) as pool:
            there = [c for c in CASES if c.source == "digits" or (IMAGES / c.source).is_dir()]
            for case in there:
                _written(case, folder)
            rows = [_compare(case, folder, pool.map) for case in there]
            drawn = []
            if DRAWN_CASE in there:
                chosen = random_points(DRAWN_CASE)[:DRAWN]
                jobs = [(DRAWN_CASE, folder, p, o) for p in chosen for o in ("sgd", "rmsprop")]
                drawn = list(pool.map(_curve, jobs))
        return {"rows": rows, "curves": drawn, "missing": len(CASES) - len(there)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def random_points(case: Case) -> list[dict[str, Any]]:
    """The random points of a case, the same at every run."""
    rng = random.Random(case.title)
    return [{k: rng.choice(values) for k, values in SPACE.items()} for _ in range(POINTS)]


Map = Callable[..., Iterator[Any]]


def _compare(case: Case, folder: Path, parallel: Map) -> dict[str, Any]:
    """Both optimisers on one case."""
    list(parallel(_train, [(case, folder, rho) for rho in SPACE["rho"]]))
    chosen = random_points(case)
    ours = [_rmsprop(case, p) for p in chosen]
    grid = [_sgd(case, MIDDLE, *rates) for rates in GRID]
    done = list(parallel(_distil, [(case, folder, *job) for job in [*ours, *grid]]))
    found, tried = done[:POINTS], done[POINTS:]
    best = max(range(len(GRID)), key=lambda i: (tried[i] is not None, tried[i] or 0.0))
    sgd = [_sgd(case, p, *GRID[best]) for p in chosen[:SGD_POINTS]]
    tuned = list(parallel(_distil, [(case, folder, *job) for job in sgd]))
    row = {
        "case": case.title,
        "network": case.network,
        "steps": case.steps,
        "rmsprop": found,
        "sgd": tuned,
        "grid": tried,
        "rates": list(GRID[best]),
        "held_out": len(_data(case, folder).test),
        "random_real": next(parallel(_baseline, [(case, folder)])),
    }
    print(_row(row), flush=True)
    return row


def _rmsprop(case: Case, point: dict[str, Any]) -> tuple[DistillConfig, float]:
    return _config(case, point, optimiser="rmsprop", lr_img=point["lr_img"]), point["rho"]


def _sgd(
    case: Case, point: dict[str, Any], lr_img: float, lr_lr: float, lr_init: float = 0.01
) -> tuple[DistillConfig, float]:
    rates = {"lr_img": lr_img, "lr_lr": lr_lr, "lr_init": lr_init}
    return _config(case, point, optimiser="sgd", **rates), point["rho"]


def _config(case: Case, point: dict[str, Any], **more: Any) -> DistillConfig:
    return DistillConfig(
        ipc=case.ipc,
        iterations=case.steps,
        ema_share=0.1,
        **{k: point[k] for k in ("syn_steps", "expert_epochs", "max_start_epoch")},
        **more,
    )


# --- in worker processes --------------------------------------------------------------------


def _begin(folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["FTD_CACHE"] = str(Path(folder) / "cache")


class _Kept:
    """Trajectories in memory."""

    def __init__(self, params: np.ndarray):
        self.experts, self._params = len(params), params

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return self._params[expert, start], self._params[expert, end]


def _written(case: Case, folder: Path) -> Path:
    """The case's part of its data set, as a Parquet data set of its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = folder / f"{case.source}-{case.per_class}-{case.classes}"
    if case.source == "digits" or out.exists():
        return out
    out.mkdir()
    for part, names in (("train", ("train-*",)), ("test", ("test-*", "validation-*"))):
        files = [f for name in names for f in sorted((IMAGES / case.source).glob(name))]
        table = pa.concat_tables([pq.read_table(f) for f in files])
        labels = table.column("label").to_numpy()
        rng = np.random.default_rng(0)
        members = [rng.permutation(np.flatnonzero(labels == k)) for k in range(case.classes)]
        count = case.per_class if part == "train" else HELD_OUT // case.classes
        rows = np.sort(np.concatenate([m[:count] for m in members]))
        taken = {"image": table.column("image").take(rows), "label": pa.array(labels[rows])}
        pq.write_table(pa.table(taken), out / f"{part}-0.parquet")
    return out


def _data(case: Case, folder: Path) -> Dataset:
    if case.source == "digits":
        return load(DatasetConfig(name="digits"))
    root = str(_written(case, folder))
    return load(DatasetConfig(name="parquet", root=root, resolution=case.resolution))


def _weights(case: Case, folder: Path, rho: float) -> Path:
    return folder / f"{case.title}-{rho}.npy"


def _train(job: tuple[Case, Path, float]) -> None:
    """Experts of a case; IPC and the like do not matter to them, but they are quick."""
    case, folder, rho = job
    config = ExpertConfig(network=case.network, lr=0.02, batch_size=128, rho=rho)
    data, backend = _data(case, folder), resolve("auto", "cpu")
    params = [
        [s.params_P.numpy() for s in train_expert(config, data, i, epochs=EPOCHS, backend=backend)]
        for i in range(EXPERTS)
    ]
    np.save(_weights(case, folder, rho), np.array(params))


def _distil(job: tuple[Case, Path, DistillConfig, float]) -> float | None:
    """Accuracy of what one point gives; None where it diverged."""
    case, folder, config, rho = job
    data, backend = _data(case, folder), resolve("auto", "cpu")
    experts = _Kept(np.load(_weights(case, folder, rho), mmap_mode="r"))
    try:
        *_, (state, record) = distill(
            config, data, experts, case.network, epochs=EPOCHS, seed=0, backend=backend
        )
    except Diverged:
        return None
    score = evaluate(
        gradients_for(network_for(case.network, data.description), backend),
        state.ema_images,
        state.label_targets,
        record.syn_lr,
        Protocol.of(PROTOCOL, network=case.network, augment=data.strategy),
        data.test,
        networks=range(NETWORKS),
        seed=0,
    )
    return round(score.mean, 4)


def _baseline(job: tuple[Case, Path]) -> float:
    """Random real images, by the same protocol."""
    case, folder = job
    data, backend = _data(case, folder), resolve("auto", "cpu")
    gradients = gradients_for(network_for(case.network, data.description), backend)
    protocol = Protocol.of(PROTOCOL, network=case.network, augment=data.strategy)
    score = evaluate_random_real(
        gradients, data, case.ipc, 0.01, protocol, data.test, networks=range(5), seed=0
    )
    return round(score.mean, 4)


def _curve(job: tuple[Case, Path, dict[str, Any], str]) -> dict[str, Any]:
    """Loss and eta over the steps, as far as it lives."""
    case, folder, point, optimiser = job
    build = _rmsprop if optimiser == "rmsprop" else _dying
    config, rho = build(case, point)
    experts = _Kept(np.load(_weights(case, folder, rho), mmap_mode="r"))
    losses, etas, end = [], [], None
    try:
        for _, record in distill(
            config, _data(case, folder), experts, case.network,
            epochs=EPOCHS, seed=0, backend=resolve("auto", "cpu"),
        ):  # fmt: skip
            losses.append(float(f"{record.loss:.4g}"))
            etas.append(float(f"{record.syn_lr:.4g}"))
    except Diverged as error:
        end = str(error)
    return {"optimiser": optimiser, "point": point, "loss": losses, "eta": etas, "end": end}


def _dying(case: Case, point: dict[str, Any]) -> tuple[DistillConfig, float]:
    return _sgd(case, point, **DYING)


# --- what is shown --------------------------------------------------------------------------


def render(results: dict[str, Any]) -> list[str]:
    rows = results["rows"]
    ours, sgd = ([v for r in rows for v in r[name]] for name in ("rmsprop", "sgd"))
    lines = [
        f"Of {len(ours)} random points of one space, over {len(rows)} data sets that nothing was "
        f"tuned to, {ours.count(None)} diverged",
        f"with `optimiser: rmsprop`; of SGD's {len(sgd)}, {sgd.count(None)}, though its two "
        "learning rates were chosen for each",
        f"data set anew, from a grid of {len(GRID)} pairs at the middle of the space. Best is over "
        "that grid and the",
        "points, the median over points that lived, the last column over points where both did. "
        "Accuracy",
        "in per cent on held-out real images (2 fresh networks, 150 epochs); ± is the standard "
        "error that",
        "the number of images alone gives a figure.",
        "",
        "| data | network | outer steps | random real | rmsprop: diverged | best | median | "
        "SGD, tuned: diverged | best | median | lr_img, lr_lr | rmsprop - SGD at the same points |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(r) for r in rows),
        "",
        "The space: "
        + ", ".join(f"{k} {' / '.join(map(str, v))}" for k, v in SPACE.items())
        + f"; {EXPERTS} experts of {EPOCHS} epochs; initial eta 0.01 for SGD, searched by rmsprop.",
    ]
    if "since" in results:  # what was measured of a later form, in words, until the next run
        lines += ["", results["since"]]
    if results["missing"]:
        lines.append(f"Not measured: {results['missing']} of the benchmark's cases.")
    if results["curves"]:
        lines += [
            "",
            f"![Loss and eta over the steps]({PICTURE})",
            "",
            f"{DRAWN_CASE.title} at 32 px: SGD with the rates that were tuned by hand for all of "
            "Imagenette",
            "(lr_img 1000, lr_lr 1e-5, eta 0.02), and rmsprop, at the first points of the table.",
        ]
    return lines


def _row(row: dict[str, Any]) -> str:
    def percent(share: float) -> str:
        error = math.sqrt(max(share * (1 - share), 0.0) / row["held_out"])
        return "–" if math.isnan(share) else f"{100 * share:.1f} ± {100 * error:.1f}"

    def figures(values: list[float | None], more: list[float | None]) -> list[str]:
        lived = [v for v in values if v is not None]
        best = max((v for v in (*lived, *more) if v is not None), default=math.nan)
        median = statistics.median(lived) if lived else math.nan
        return [f"{values.count(None)} of {len(values)}", percent(best), percent(median)]

    lr_img, lr_lr = row["rates"]
    cells = [row["case"], row["network"], str(row["steps"]), percent(row["random_real"])]
    cells += [*figures(row["rmsprop"], []), *figures(row["sgd"], row["grid"])]
    pairs = zip(row["rmsprop"], row["sgd"], strict=False)
    gains = [100 * (ours - sgd) for ours, sgd in pairs if ours is not None and sgd is not None]
    both = f"{statistics.fmean(gains):+.1f} (n = {len(gains)})" if gains else "–"
    return "| " + " | ".join([*cells, f"{lr_img:g}, {lr_lr:g}", both]) + " |"


def draw(record: dict[str, Any], folder: Path = HERE) -> None:
    """Loss and eta over the steps, a column a point; a cross is where SGD died."""
    from matplotlib.figure import Figure

    curves = record["results"]["curves"]
    points = [c["point"] for c in curves if c["optimiser"] == "sgd"]
    figure = Figure(figsize=(2.3 * len(points), 5.2), layout="constrained")
    grid = figure.subplots(2, len(points), sharex=True, sharey="row", squeeze=False)
    for column, point in enumerate(points):
        for curve in curves:
            if curve["point"] != point or not curve["loss"]:
                continue
            ours = curve["optimiser"] == "rmsprop"
            colour = "#1f77b4" if ours else "#c0392b"
            for axes, key in zip(grid[:, column], ("loss", "eta"), strict=True):
                x = range(1, len(curve[key]) + 1)
                axes.plot(x, curve[key], color=colour, label="rmsprop" if ours else "SGD")
                if curve["end"]:
                    axes.plot([x[-1]], [curve[key][-1]], "x", color=colour, ms=10, mew=2.5)
        grid[0, column].set_title(
            f"N = {point['syn_steps']}, M = {point['expert_epochs']}, rho = {point['rho']:g}",
            fontsize=9,
        )
        grid[1, column].set_xlabel("outer step")
    grid[0, 0].set(ylabel="matching loss", yscale="log")
    grid[1, 0].set(ylabel="eta", yscale="log")
    for axes in grid.flat:
        axes.grid(visible=True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(folder / PICTURE, dpi=110, metadata={"Software": None})
