"""The sections of a sweep that are not of ``ftd``, each with the rules that it can check alone."""

from dataclasses import dataclass
from typing import Any, Literal

from ftd.backends import resolve
from ftd.errors import UserError
from ftd.expert import Numerics
from ftd_ray.store.text import parse_size

Objective = Literal["accuracy", "gpu_seconds", "cpu_seconds", "ipc"]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the space is searched, what is compared, and when it ends."""

    trials: int
    """Trials in all; a failed one counts."""
    concurrency: int = 2
    """Trials at a time."""
    sampler: Literal["tpe", "gp", "cmaes", "qmc", "random", "grid", "nsga2"] = "tpe"
    """Of Optuna. nsga2 is for several objectives. One that would silently draw a dimension of the
    space at random is refused."""
    startup_trials: int | None = None
    """Trials at random before tpe and gp learn; None for 10."""
    population: int | None = None
    """Trials of a generation of nsga2; None for 20."""
    pruner: Literal["asha", "hyperband", "median", "wilcoxon", "none"] = "asha"
    """Asked at every report, on validation accuracy against outer steps; wilcoxon against the best
    trial's fresh networks one by one, when a distillation has ended. With several objectives none,
    also where it is left out."""
    grace: int | None = None
    """Outer steps before asha, hyperband and median may prune; None for the first report
    (evaluate.every)."""
    reduction_factor: int | None = None
    """asha and hyperband keep one trial in so many at each rung; None for 3."""
    objectives: tuple[Objective, ...] = ("accuracy",)
    """What is compared: accuracy (validation) and, beside it, what should be small: gpu_seconds or
    cpu_seconds (of a trial's worker times its share), ipc. The best trial is the most accurate."""
    repeats: int = 1
    """Distillations of each trial, from the same seeds in all trials; their mean is compared."""
    duplicates: Literal["repeat", "skip"] = "repeat"
    """A point that is drawn again: repeat distils it anew by another seed, skip draws another."""
    start_from: tuple[str | dict[str, Any], ...] = ()
    """Points to try first: names of presets, such as ftd-cifar10-ipc10 (FTD Table 7), or mappings
    such as {experts.rho: 0.01}; dimensions that one does not name are sampled."""
    warm_start: str | None = None
    """output.dir of an earlier sweep of the same data, from whose complete trials tpe or gp learns,
    as far as they are points of this space."""
    max_hours: float | None = None
    """Wall time after which no trial goes on; over all sessions, without the final evaluation."""
    max_gpu_hours: float | None = None
    """GPU hours after which no trial goes on: trials, and experts that were built for them."""
    finalists: int = 1
    """Best trials that are evaluated by the full protocol on validation images at the end; the best
    of them then is the winner, and the only one to see test images."""

    def __post_init__(self) -> None:
        least = {"reduction_factor": 2, "population": 2, "grace": 1}
        for key in (
            "trials", "concurrency", "startup_trials", "population", "grace", "reduction_factor",
            "repeats", "finalists",
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < least.get(key, 1):
                raise UserError(f"search.{key}={value} must be at least {least.get(key, 1)}.")
        for key in ("max_hours", "max_gpu_hours"):
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"search.{key}={value} must be above 0, or null for no limit.")
        for key, owners in (
            ("startup_trials", ("tpe", "gp")),
            ("population", ("nsga2",)),
            ("warm_start", ("tpe", "gp")),
        ):
            self._only_with(key, "sampler", owners)
        self._only_with("reduction_factor", "pruner", ("asha", "hyperband"))
        self._only_with("grace", "pruner", ("asha", "hyperband", "median"))
        if self.start_from and self.sampler == "grid":
            raise UserError(
                "search.start_from has no effect with search.sampler=grid, which visits every "
                "point. Leave it out, or take another sampler."
            )
        if self.finalists > self.trials:
            raise UserError(
                f"search.finalists={self.finalists} is above search.trials={self.trials}. Lower it."
            )
        if len(self.start_from) > self.trials:
            raise UserError(
                f"search.start_from names {len(self.start_from)} points, and search.trials="
                f"{self.trials} has no room for them. Raise it."
            )
        self._check_objectives()

    def _only_with(self, key: str, other: str, owners: tuple[str, ...]) -> None:
        if getattr(self, key) is not None and getattr(self, other) not in owners:
            raise UserError(
                f"search.{key}={getattr(self, key)} has no effect with search.{other}="
                f"{getattr(self, other)}. Leave it out, or take {' or '.join(owners)}."
            )

    def _check_objectives(self) -> None:
        names = self.objectives
        if "accuracy" not in names or len(set(names)) < len(names):
            raise UserError(
                f"search.objectives={list(names)} must hold accuracy, and each objective once."
            )
        if len(names) > 1 and self.pruner != "none":
            raise UserError(
                f"search.pruner={self.pruner} cannot prune by several objectives "
                f"({', '.join(names)}). Take search.pruner=none."
            )
        if len(names) > 1 and self.sampler == "cmaes":
            raise UserError(
                f"search.sampler=cmaes cannot search for several objectives ({', '.join(names)}). "
                "Take nsga2, tpe or gp."
            )
        if self.sampler == "nsga2":
            if len(names) == 1:
                raise UserError(
                    "search.sampler=nsga2 is for several objectives, and there is accuracy alone. "
                    "Take tpe, or add to search.objectives."
                )
            if self.trials <= self.population_size:
                raise UserError(
                    f"search.sampler=nsga2 draws its first {self.population_size} trials at "
                    f"random, and search.trials={self.trials} leaves nothing after them. Raise it, "
                    "or lower search.population."
                )

    @property
    def population_size(self) -> int:
        return self.population or 20

    @property
    def startup(self) -> int:
        return self.startup_trials or 10


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What one worker takes. GPUs may be fractions: two workers of 0.5 share one."""

    cpus_per_expert: float = 1
    """Also its threads, when it trains on CPUs: part of what an expert set is."""
    gpus_per_expert: float | Literal["auto"] = 0
    """Above 0, experts train on a GPU, kept to that share of its memory. auto: as many share one as
    its memory holds, measured on each kind of GPU that the cluster has."""
    cpus_per_trial: float = 1
    """Also its threads, when it works on CPUs."""
    gpus_per_trial: float = 0
    """Above 0, trials work on a GPU, kept to that share of its memory: batches are cut to it. How
    many share one is a matter of speed."""
    max_experts_at_once: int | None = None
    """Experts of one size in training at a time, at most. None for as many as are due and the
    cluster, or what its autoscaler may start, has room for."""
    memory_per_expert: int | str | None = None
    """Memory that is booked for an expert, in bytes or as 2GB: a node takes no more experts and
    trials than its memory holds. None books none."""
    memory_per_trial: int | str | None = None
    """The same for trials."""
    expert_backend: Literal["auto", "native", "compiled", "eager"] = "auto"
    """How experts compute gradients: native (C kernels, on CPU), compiled (torch.compile) or eager.
    Part of what an expert set is."""
    trial_backend: Literal["auto", "native", "compiled", "eager"] = "auto"
    """The same for trials."""

    def __post_init__(self) -> None:
        for key in ("cpus_per_expert", "cpus_per_trial"):
            if not 0 < getattr(self, key) < float("inf"):
                raise UserError(f"resources.{key}={getattr(self, key)} must be above 0.")
        for key in ("gpus_per_expert", "gpus_per_trial"):
            value = getattr(self, key)
            if value != "auto" and not 0 <= value <= 1:
                raise UserError(
                    f"resources.{key}={value} must lie from 0 to 1: a worker uses one GPU or a "
                    "share of it."
                )
        if self.max_experts_at_once is not None and self.max_experts_at_once < 1:
            raise UserError(
                f"resources.max_experts_at_once={self.max_experts_at_once} must be at least 1, or "
                "null for as many as there is room for."
            )
        for key in ("memory_per_expert", "memory_per_trial"):
            object.__setattr__(self, key, _bytes(key, getattr(self, key)))
        for kind in ("expert", "trial"):  # settled here, so that a resume cannot choose otherwise
            key, gpus = f"{kind}_backend", getattr(self, f"gpus_per_{kind}")
            if gpus and getattr(self, key) == "native":
                raise UserError(
                    f"resources.{key}=native is for CPUs, and resources.gpus_per_{kind}={gpus} "
                    f"takes a GPU. Take auto, compiled or eager for {key}."
                )
            found = resolve(getattr(self, key), "cuda" if gpus else "cpu")
            object.__setattr__(self, key, found)

    @property
    def expert_gpus(self) -> float | None:
        """GPUs of an expert; None for a share that the fleet measures."""
        return None if self.gpus_per_expert == "auto" else float(self.gpus_per_expert)

    @property
    def expert_memory(self) -> int:
        """Bytes that are booked for an expert; 0 for none."""
        return int(self.memory_per_expert or 0)

    @property
    def trial_memory(self) -> int:
        """Bytes that are booked for a trial; 0 for none."""
        return int(self.memory_per_trial or 0)

    @property
    def expert_numerics(self) -> Numerics:
        gpus = 1 if self.expert_gpus is None else self.expert_gpus
        return _numerics(self.cpus_per_expert, gpus, self.expert_backend)

    @property
    def trial_numerics(self) -> Numerics:
        return _numerics(self.cpus_per_trial, self.gpus_per_trial, self.trial_backend)


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Where expert sets are kept, to be shared by all sweeps."""

    uri: str = "./store"
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the snapshots on disk: half the bytes for slightly other segments, so another expert set.
    Training always goes on in float32."""
    cache_mb: int | None = None
    """Segments that a node keeps in memory for its trials, at most half of Ray's object store.
    None for all that the plan says trials will read."""

    def __post_init__(self) -> None:
        if self.cache_mb is not None and self.cache_mb < 1:
            raise UserError(f"store.cache_mb={self.cache_mb} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps runs."""

    uri: str = "sqlite:///mlflow.db"
    experiment: str | None = None
    """None for the name of the sweep."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where the sweep's own folder lies."""

    dir: str | None = None
    """None for runs/<name>."""


def _numerics(cpus: float, gpus: float, backend: str) -> Numerics:
    return Numerics.on("cuda" if gpus else "cpu", max(1, int(cpus)), backend)


def _bytes(key: str, value: int | str | None) -> int | None:
    """The bytes that a key of ``resources`` books."""
    if value is None:
        return None
    try:
        size = parse_size(str(value))
    except UserError as error:
        raise UserError(f"resources.{key}={value!r}: {error}") from None
    if size < 1:
        raise UserError(f"resources.{key}={value} must be above 0, or null to book none.")
    return size
