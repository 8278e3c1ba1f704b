"""Scale: what a cluster of many nodes, experts and trials costs the driver, the broker and S3.

Everything is real but the work and the machines: nodes are Ray's on this machine, each with a CPU
and a GPU that is not there, which nothing books, since work on a GPU needs CUDA; experts are
trained on 40 images of 8 x 8 and trials take four outer steps, on the CPU. The commands are those
of users: the store is filled by ``ftd_ray.experts``, then ``ftd_ray.sweep`` searches, with the
store and the sweep's folder on an S3 server and MLflow in SQLite. All of it shares this machine's
cores, so processor time counts, not wall time.
"""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import yaml
from PIL import Image
from ray.cluster_utils import Cluster

from benchmarks.report import HERE, ROOT, spread
from benchmarks.watch import Sample, Watch

PICTURE = "scale.png"
SIZES = "FTD_SCALE"
"""The variable of the environment that gives other sizes: nodes=8,trials=50."""

ROLES = {
    "driver": ("-m ftd_ray.",),
    "broker": ("ray::Broker",),
    "GCS": ("gcs_server",),
    "pool": ("ray::WorkerPool",),
    "trainables": ("ray::SweepTrial", "ray::ResourceTrainable"),
    "expert actors": ("ray::ExpertActor",),
    "trial workers": ("ray::TrialWorker",),
    "caches": ("ray::SegmentCache",),
    "S3": ("moto.server",),
    "nodes": ("raylet/raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE"),
}
"""Of the processes: words of their command."""

ENDED = re.compile(r"^trial +\d+  (?:complete|pruned|failed)", re.MULTILINE)
EXPERTS = re.compile(r"^experts    (\d+)/", re.MULTILINE)
REQUEST = re.compile(r'\[(\d+/\w+/\d+ [\d:]+)\] "(?:\x1b\[[\d;]+m)*(\w+) (\S+)')

PYTHON = (sys.executable,)
"""What runs the commands; a profiler may stand before them."""

OBJECT_STORE = 80 * 2**20
"""Bytes, the least that Ray takes."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    nodes: int = 64
    trials: int = 1000
    sets: int = 20
    experts: int = 50
    """Of each set."""
    epochs: int = 50
    experts_at_once: int = 8
    trials_at_once: int = 8

    @classmethod
    def of(cls, text: str) -> "Size":
        """``nodes=8,trials=50``: what is not named stays."""
        known = {f.name for f in fields(cls)}
        given = dict(part.split("=") for part in text.split(",") if part)
        if unknown := given.keys() - known:
            raise ValueError(f"{SIZES} names {min(unknown)}. Take of {', '.join(sorted(known))}.")
        return cls(**{k: int(v) for k, v in given.items()})


def run() -> dict[str, Any]:
    size = Size.of(os.environ.get(SIZES, ""))
    with tempfile.TemporaryDirectory(prefix="ftd-bench-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        make_images(folder / "images")
        with s3_server(folder / "requests.log") as bucket, cluster(size.nodes) as (address, nodes):
            (folder / "scale.yaml").write_text(yaml.safe_dump(sweep_of(size, bucket, folder)))
            print("nodes", nodes, flush=True)
            fill = command(folder, "experts", address, last_count)
            print("fill", fill["seconds"], flush=True)
            search = command(folder, "sweep", address, ended_trials)
            print("search", search["seconds"], flush=True)
        asked = requests_of((folder / "requests.log").read_text())
    return {
        "size": asdict(size),
        "nodes": nodes,
        "fill": filled(fill, asked),
        "search": searched(search, asked),
        "curves": {
            k: curves(found["samples"]) for k, found in (("fill", fill), ("search", search))
        },
    }


# --- what is run ----------------------------------------------------------------------------


def make_images(root: Path) -> None:
    """Two classes of 20 images."""
    for c, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng([i, c]).integers(0, 128, (8, 8, 3), np.uint8) + 127 * c
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03d}.png")


def sweep_of(size: Size, bucket: str, folder: Path) -> dict[str, Any]:
    """A sweep that asks for all sets, and does next to nothing with them."""
    return {
        "name": "scale",
        "dataset": {
            "name": "imagefolder",
            "root": str(folder / "images"),
            "resolution": 8,
            "val_fraction": 0.2,
        },
        "experts": {
            "network": "ConvNetD1W1",
            "count": size.experts,
            "epochs": size.epochs,
            "batch_size": 64,
            "lr": {"choice": [round(0.01 + 0.001 * i, 3) for i in range(size.sets)]},
        },
        "distill": {
            "ipc": 1,
            "syn_steps": 1,
            "expert_epochs": {"int": [1, 3]},
            "max_start_epoch": max(1, size.epochs - 5),
            "iterations": 4,
            "lr_img": {"float": [0.01, 1.0], "log": True},
            "optimiser": "rmsprop",
        },
        "evaluate": {
            "every": 2, "search_networks": 1, "search_epochs": 1, "networks": 1, "epochs": 1,
        },
        "search": {"trials": size.trials, "concurrency": size.trials_at_once},
        "resources": {"max_experts_at_once": size.experts_at_once},
        "store": {"uri": f"s3://{bucket}/store"},
        "output": {"dir": f"s3://{bucket}/sweep"},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }  # fmt: skip


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """The bucket of a real S3 server on loopback; ``log`` gets its requests."""
    sys.path.insert(0, str(ROOT / "tests"))
    helpers = importlib.import_module("s3_helpers")
    with helpers.S3Server(log=str(log)) as server:
        os.environ.update(helpers.s3_environment(server.address))
        yield server.bucket


@contextlib.contextmanager
def cluster(count: int) -> Iterator[tuple[str, dict[str, float]]]:
    """(address of a cluster of a head and ``count`` nodes, what a node costs)."""
    os.environ["PYTHONPATH"] = str(ROOT)
    began = time.monotonic()
    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False},
    )
    try:
        for _ in range(count):
            found.add_node(wait=False, num_cpus=1, num_gpus=1, object_store_memory=OBJECT_STORE)
        found.wait_for_nodes(timeout=600)
        cost = {"seconds": time.monotonic() - began, "mib": 0.0}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                cost["mib"] += process.memory_full_info().pss / 2**20 / (count + 1)
        yield found.address, cost
    finally:
        found.shutdown()


def last_count(text: str) -> int:
    """Experts that the last line counts."""
    return max(map(int, EXPERTS.findall(text)), default=0)


def ended_trials(text: str) -> int:
    return len(ENDED.findall(text))


def command(folder: Path, name: str, address: str, count: Any) -> dict[str, Any]:
    """Runs a command to its end; the samples of all processes meanwhile."""
    told = folder / f"{name}.txt"
    told.touch()
    with told.open("w") as out, Watch(ROLES, lambda: count(told.read_text())) as watch:
        began = time.time()
        subprocess.run(
            [*PYTHON, "-m", f"ftd_ray.{name}", "scale.yaml", "--address", address],
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=True,
        )
    return {"seconds": time.time() - began, "began": began, "samples": watch.samples}


# --- requests -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    time: float
    kind: str
    place: str
    """store or sweep."""


def requests_of(log: str) -> list[Request]:
    """What an S3 server was asked, by its log."""
    found = []
    for when, method, path in REQUEST.findall(log):
        url = urlsplit(path)
        _, _, key = url.path.lstrip("/").partition("/")
        prefix = re.search(r"prefix=(\w+)", url.query)
        place = (key or (prefix[1] if prefix else "")).partition("/")[0]
        if place in ("store", "sweep"):
            seconds = time.mktime(time.strptime(when, "%d/%b/%Y %H:%M:%S"))
            found.append(Request(seconds, _kind(method, url.query), place))
    return found


def _kind(method: str, query: str) -> str:
    if "list-type" in query:
        return "LIST"
    return method


def between(asked: Sequence[Request], begin: float, end: float) -> dict[str, dict[str, int]]:
    """Requests of a time, by place and kind."""
    found: dict[str, Counter[str]] = {"store": Counter(), "sweep": Counter()}
    for r in asked:
        if begin <= r.time < end:
            found[r.place][r.kind] += 1
    return {place: dict(kinds) for place, kinds in found.items()}


# --- figures --------------------------------------------------------------------------------

LAST = 0.97
"""Of the trials, up to which the last third is counted: then the end of the sweep begins."""


def filled(found: dict[str, Any], asked: Sequence[Request]) -> dict[str, Any]:
    first, last = found["samples"][0], found["samples"][-1]
    return {
        "seconds": found["seconds"],
        "experts": last["done"],
        "cpu": {r: last[r]["cpu"] - first[r]["cpu"] for r in ROLES},
        "requests": between(asked, found["began"] - 1, found["began"] + found["seconds"] + 1),
        "peak": {r: max(s[r]["mib"] for s in found["samples"]) for r in ROLES},
    }


def searched(found: dict[str, Any], asked: Sequence[Request]) -> dict[str, Any]:
    samples = found["samples"]
    trials = samples[-1]["done"]
    marks = [at(samples, trials * share) for share in (0, 1 / 3, 2 / 3, LAST)]
    thirds = []
    for begin, end in pairwise(marks):
        n = end["done"] - begin["done"]
        thirds.append(
            {
                "trials": n,
                "seconds": end["time"] - begin["time"],
                "cpu": {r: end[r]["cpu"] - begin[r]["cpu"] for r in ROLES},
                "mib": {r: end[r]["mib"] - begin[r]["mib"] for r in ROLES},
                "requests": between(asked, begin["time"], end["time"]),
            }
        )
    return {
        "seconds": found["seconds"],
        "trials": trials,
        "thirds": thirds,
        "peak": {r: max(s[r]["mib"] for s in samples) for r in ROLES},
    }


def at(samples: Sequence[Sample], done: float) -> Sample:
    """The first sample with so much done."""
    if not done:  # the last with nothing done: the start is not part of it
        return [s for s in samples if not s["done"]][-1]
    return next(s for s in samples if s["done"] >= done)


def curves(samples: Sequence[Sample], points: int = 150) -> list[Sample]:
    """Some of the samples, evenly, with times from the first."""
    step = max(1, len(samples) // points)
    kept = [*samples[::step], samples[-1]]
    shown = ("driver", "broker", "GCS")
    return [
        {
            "seconds": round(s["time"] - samples[0]["time"], 1),
            "done": s["done"],
            **{r: {"cpu": round(s[r]["cpu"], 2), "mib": round(s[r]["mib"], 1)} for r in shown},
        }
        for s in kept
    ]


# --- the page -------------------------------------------------------------------------------

PLATFORM = ("driver", "broker", "GCS", "pool")
"""What there is one of, whatever the number of nodes and trials."""


def render(results: dict[str, Any]) -> list[str]:
    size, fill, search = Size(**results["size"]), results["fill"], results["search"]
    asked = "" if size == Size() else f" (the full size is {described(Size())})"
    experts, broker = steady(results["curves"]["fill"], "broker")
    epochs = experts * size.epochs
    per_trial = [t["cpu"]["driver"] / t["trials"] for t in search["thirds"]]
    share = [t["cpu"]["driver"] / t["seconds"] for t in search["thirds"]]
    rates = [t["trials"] / t["seconds"] for t in search["thirds"]]
    return [
        f"{described(size)}{asked}.",
        "Ray's nodes are on this machine, each with a CPU and a GPU that is not there and that "
        "nothing books.",
        "Store and sweep's folder lie on a real S3 server on loopback, MLflow is SQLite. The work",
        "is next to nothing (40 images of 8 x 8, a network of width 1, four outer steps), the "
        "platform is all real:",
        "`python -m ftd_ray.experts` fills the store, then `python -m ftd_ray.sweep` searches. All "
        "processes share",
        "this machine's cores, so processor time is shown. A node takes "
        f"{results['nodes']['mib']:.0f} MiB with its agents.",
        "",
        f"Filling the store, an expert of {size.epochs} epochs: {1000 * broker / experts:.0f} ms "
        f"of the broker ({1e6 * broker / epochs:.0f} µs an epoch,",
        f"so it saturates at {epochs / broker:,.0f} epochs a second), "
        f"{1000 * steady(results['curves']['fill'], 'GCS')[1] / experts:.0f} ms of Ray's GCS, "
        f"{1000 * steady(results['curves']['fill'], 'driver')[1] / experts:.0f} ms of the command,",
        f"{total(fill['requests']['store']) / fill['experts']:.0f} requests to the store "
        f"({by_kind(fill['requests']['store'], fill['experts'])}).",
        "",
        "The search, by thirds of its trials:",
        "",
        "| for each trial | first | second | last |",
        "|---|---|---|---|",
        *(
            f"| {role}: processor time | "
            + " | ".join(f"{1000 * t['cpu'][role] / t['trials']:.0f} ms" for t in search["thirds"])
            + " |"
            for role in PLATFORM
        ),
        "| requests to the store | "
        + " | ".join(f"{total(t['requests']['store']) / t['trials']:.1f}" for t in search["thirds"])
        + " |",
        "| requests to the sweep's folder | "
        + " | ".join(f"{total(t['requests']['sweep']) / t['trials']:.1f}" for t in search["thirds"])
        + " |",
        "| driver: memory that it grew by | "
        + " | ".join(f"{1024 * t['mib']['driver'] / t['trials']:.0f} KiB" for t in search["thirds"])
        + " |",
        "",
        f"The driver took {spread(share, '{:.2f}')} of a core while {spread(rates, '{:.1f}')} "
        "trials ended a",
        f"second; alone on a core it saturates at {1 / per_trial[-1]:.0f} a second.",
        f"Resident at most: driver {search['peak']['driver']:.0f} MiB, broker "
        f"{max(fill['peak']['broker'], search['peak']['broker']):.0f} MiB, GCS "
        f"{search['peak']['GCS']:.0f} MiB.",
        "",
        *CHANGED,
        "",
        f"![Processor time and memory over the search]({PICTURE})",
    ]


CHANGED: Sequence[str] = (
    "What it found, and what was changed for it (before: 8 nodes, up to 240 trials): an expert of "
    "50 epochs took 145",
    "requests, since each small file was uploaded in parts and each part of an expert made its "
    "folders anew; a trial took",
    "18 in the sweep's folder, and the search's loop waited for more than half of them, 0.2 s a "
    "trial on a busy loopback:",
    "what a trial leaves is removed beside the loop now. The driver grew by 0.4 to 0.5 MiB a "
    "trial, since Tune keeps every",
    "trial's order and last report, and wrote all of them to a file of its own again and again; "
    "and it looked its broker up",
    "by name 2.5 times a trial (8 ms each), now once a second.",
)
"""What this measurement found, and what was changed for it."""


def steady(samples: Sequence[dict[str, Any]], role: str) -> tuple[int, float]:
    """What was done between the first and the last of it, and the processor time of that."""
    begun = [s for s in samples if s["done"] and s[role]["mib"]]
    return begun[-1]["done"] - begun[0]["done"], begun[-1][role]["cpu"] - begun[0][role]["cpu"]


def described(size: Size) -> str:
    return (
        f"{size.nodes} nodes, {size.trials:,} trials, {size.sets * size.experts:,} experts "
        f"({size.sets} sets) of {size.epochs} epochs"
    )


def total(kinds: dict[str, int]) -> int:
    return sum(kinds.values())


def by_kind(kinds: dict[str, int], count: int) -> str:
    shown = sorted(kinds.items(), key=lambda k: -k[1])
    return ", ".join(f"{kind} {n / count:.0f}" for kind, n in shown if n >= count / 2)


def draw(record: dict[str, Any], folder: Path = HERE) -> None:
    """Processor time and memory of driver, broker and GCS over the trials that have ended."""
    from matplotlib.figure import Figure

    samples = record["results"]["curves"]["search"]
    samples = [s for s in samples if s["driver"]["mib"]]
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    for axes, key, unit in zip(
        figure.subplots(1, 2), ("cpu", "mib"), ("processor time, s", "resident, MiB"), strict=True
    ):
        for role, colour in zip(("driver", "broker", "GCS"), COLOURS, strict=True):
            x, y = [s["done"] for s in samples], [s[role][key] for s in samples]
            axes.plot(x, y, color=colour, label=role)
        axes.set(xlabel="trials that have ended", ylabel=unit, ylim=(0, None))
        axes.grid(visible=True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(folder / PICTURE, dpi=110, metadata={"Software": None})


COLOURS = ("#1f77b4", "#c0392b", "#7f7f7f")
