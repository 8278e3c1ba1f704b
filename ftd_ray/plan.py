"""What a sweep is going to do, worked out before anything is started."""

import os
import shutil
from dataclasses import dataclass
from typing import Any

from ftd.data import Progress, describe
from ftd.data.dataset import Description
from ftd.expert import ExpertConfig, Numerics, network_for, set_key
from ftd.native import unavailable
from ftd.trajectory import PART_EPOCHS, ExpertSet
from ftd_ray.config import SweepConfig
from ftd_ray.dataplan import data_lines
from ftd_ray.earlier import Earlier
from ftd_ray.fit import Machine, memory_lines
from ftd_ray.pictures import short_names
from ftd_ray.presets import StartPoint, start_points
from ftd_ray.progress import describe_params
from ftd_ray.space import count_points
from ftd_ray.storage import is_local, open_uri
from ftd_ray.store import TrajectoryStore
from ftd_ray.store.text import size_text

MOST_POINTS = 1_000_000
"""Points of a space that are counted."""

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Of a parameter on disk."""


@dataclass(frozen=True)
class PlannedSet:
    """One distinct expert set of the space."""

    key: str
    params: dict[str, object]
    experts: ExpertConfig
    present: int
    """Experts that the store has already, with all their epochs."""
    parameters: int
    precision: str

    @property
    def missing(self) -> int:
        return self.experts.count - self.present

    @property
    def bytes_missing(self) -> int:
        """Disk that the missing experts take: a snapshot an epoch, and one of the start."""
        epochs, size = self.experts.epochs, BYTES[self.precision]
        whole = bool(self.experts.momentum) + (size < 4)  # float32 state, once a part
        bytes_each = (epochs + 1) * size + -(-epochs // PART_EPOCHS) * whole * 4
        return self.missing * bytes_each * self.parameters


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep; ``text`` is what users see."""

    config: SweepConfig
    data: Description
    sets: tuple[PlannedSet, ...]
    earlier: Earlier | None = None
    """What the search begins to learn from."""

    @property
    def bytes_missing(self) -> int:
        return sum(s.bytes_missing for s in self.sets)

    @property
    def hot_bytes(self) -> int:
        """What trials read again and again: each expert up to the last epoch that segments reach,
        as float32."""
        starts, lengths = (
            self.config.values_of(f"distill.{k}") for k in ("max_start_epoch", "expert_epochs")
        )
        snapshots = max(starts) + max(lengths)  # from epoch 0 on
        return sum(
            s.experts.count * min(snapshots, s.experts.epochs + 1) * s.parameters * 4
            for s in self.sets
        )

    @property
    def cache_bytes(self) -> int:
        """What a node keeps of it, where its object store is large enough."""
        given = self.config.store.cache_mb
        return self.hot_bytes if given is None else given * 2**20

    def expert_set(self, params: dict[str, Any]) -> tuple[str, str]:
        """Key and place of the expert set of a point."""
        c = self.config
        key = set_key(c.identity(c.at(params).experts, self.data))
        return key, TrajectoryStore(c.store.uri).location(key)

    def disk_free(self) -> int | None:
        """Bytes free at the store, where it is on this machine."""
        if not is_local(self.config.store.uri):
            return None
        _, path = open_uri(self.config.store.uri)
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        return shutil.disk_usage(path).free

    def text(self, lacking: list[str], machine: Machine | None = None) -> str:
        """The plan in lines; ``lacking`` are resources that this machine or cluster lacks.

        ``machine`` is where it would run, if that is here.
        """
        c, r = self.config, self.config.resources
        optimisers = " or ".join(dict.fromkeys(c.values_of("distill.optimiser")))
        lines = [
            *self._data_lines(),
            f"distill    {c.distill.ipc} image{'s' if c.distill.ipc > 1 else ''} per class, "
            f"{c.experts.network}, {c.distill.iterations} outer steps by {optimisers}, "
            f"augment {c.dataset.strategy}" + (", ZCA" if c.dataset.zca else ""),
            *self._search_lines(),
            *self._space_lines(),
            *self._expert_lines(),
            f"segments   {size_text(self.hot_bytes)} of the store that trials read; a node keeps "
            f"{size_text(self.cache_bytes)}, if half of its object store holds that",
            f"resources  {_expert_text(c)}, "
            f"a trial {_res(r.cpus_per_trial, r.gpus_per_trial, r.trial_memory)}",
            *_missing_lines(lacking),
            *_backend_lines(r.expert_numerics, r.trial_numerics),
            *memory_lines(c, self.data, machine),
            f"store      {c.store.uri}",
            f"tracking   {c.tracking.uri} (experiment {c.experiment})",
            f"output     {c.output_dir}",
        ]
        return "\n".join(lines)

    def experts_text(self, lacking: list[str], machine: Machine | None = None) -> str:
        """The part of the plan that is about experts, for filling a store ahead of a sweep."""
        c, r = self.config, self.config.resources
        lines = [
            *self._data_lines(),
            *self._expert_lines(),
            f"resources  {_expert_text(c)}",
            *_missing_lines(lacking),
            *_backend_lines(r.expert_numerics),
            *memory_lines(c, self.data, machine, experts_only=True),
            f"store      {c.store.uri}",
            f"tracking   {c.tracking.uri} (experiment {c.experiment})",
        ]
        return "\n".join(lines)

    def _data_lines(self) -> list[str]:
        return [f"sweep      {self.config.name}", *data_lines(self.data)]

    def _search_lines(self) -> list[str]:
        s = self.config.search
        learns = f" (the first {s.startup} at random)" if s.sampler in ("tpe", "gp") else ""
        parts = [
            f"{s.trials} trials",
            f"{s.concurrency} at a time",
            f"{s.sampler}{learns if self.earlier is None else ''}",
            f"pruner {s.pruner}",
        ]
        if len(s.objectives) > 1:
            parts.append(f"objectives {' and '.join(s.objectives)}")
        if s.repeats > 1:
            parts.append(f"{s.repeats} distillations each")
        if s.duplicates == "skip":
            parts.append("no point twice")
        for limit, unit in ((s.max_hours, "hours"), (s.max_gpu_hours, "GPU hours")):
            if limit is not None:
                parts.append(f"at most {limit:g} {unit}")
        lines = ["search     " + ", ".join(parts)]
        for point in start_points(self.config):
            lines.append(f"  first    {point.label}{_deviations(point)}")
        if (e := self.earlier) is not None:
            lines.append(
                f"  learns   from {len(e.trials)} of {e.complete} complete trials of {e.uri}; the "
                "others are no points of this space"
                if len(e.trials) < e.complete
                else f"  learns   from {e.complete} complete trials of {e.uri}"
            )
        return lines

    def _space_lines(self) -> list[str]:
        space = self.config.space
        if not space:
            return []
        width = max(len(dim.key) for dim in space)
        many = "infinitely many"
        if all(dim.discrete for dim in space):
            number = count_points(space, MOST_POINTS)
            many = f"over {MOST_POINTS}" if number is None else str(number)
        lines = [f"  {dim.key:{width}}  {dim}" for dim in space]
        return [*lines, f"  {many} point{'' if many == '1' else 's'}"]

    def _expert_lines(self) -> list[str]:
        names = short_names(self.config.space)
        built = sum(s.missing for s in self.sets)
        wanted = sum(s.experts.count for s in self.sets)
        lines = [
            f"experts    {len(self.sets)} distinct set{'s' if len(self.sets) > 1 else ''}, "
            f"{wanted} experts: {wanted - built} in the store, {built} to build"
        ]
        for s in self.sets[:20]:
            label = describe_params(s.params, names) if s.params else s.experts.network
            lines.append(
                f"  {s.key}  {label}: {s.experts.count} x {s.experts.epochs} epochs, "
                f"{s.present} in the store"
            )
        if len(self.sets) > 20:
            lines.append(f"  … and {len(self.sets) - 20} more")
        free = self.disk_free()
        lines.append(
            f"disk       {size_text(self.bytes_missing)} for the experts to build"
            + (
                f" in {self.config.store.precision}"
                if self.config.store.precision != "float32"
                else ""
            )
            + (f", {size_text(free)} free" if free is not None else "")
        )
        return lines


def _deviations(point: StartPoint) -> str:
    """What the sweep does otherwise than a preset, for it is not the paper's run then."""
    here = [f"{key} {mine} instead of {theirs}" for key, (mine, theirs) in point.others.items()]
    return f", with {', '.join(here)}" if here else ""


def make_plan(config: SweepConfig, progress: Progress | None = None, *, read: bool = False) -> Plan:
    """Looks at the data set and the store. Raises UserError when the space does not fit them.

    The first time it looks at every image, and tells ``progress``. With ``read`` experts count
    whose manifests are whole; else their names suffice, one listing for a set.
    """
    data = describe(config.dataset, progress)
    config.check_against(data)
    store = TrajectoryStore(config.store.uri)
    sets: dict[str, PlannedSet] = {}
    for params, experts in config.expert_points():
        identity = config.identity(experts, data)
        key = set_key(identity)
        known = sets.get(key)
        if known is not None:  # such as rho = 0 under two names, or more epochs of the same set
            if (experts.count, experts.epochs) <= (known.experts.count, known.experts.epochs):
                continue
            params = known.params
        present = _complete(store.expert_set(identity), experts.epochs, read=read)
        sets[key] = PlannedSet(
            key=key,
            params=params,
            experts=experts,
            present=sum(i < experts.count for i in present),
            parameters=network_for(experts.network, data).size,
            precision=config.store.precision,
        )
    return Plan(config, data, tuple(sets.values()))


def _complete(experts: ExpertSet, epochs: int, *, read: bool) -> list[int]:
    """Experts that need no training. A damaged one does, and the broker will see to it."""
    published = experts.published()
    damaged = experts.damaged_manifests() if read else ()
    return [i for i, there in published.items() if there >= epochs and i not in damaged]


@dataclass(frozen=True)
class Need:
    """What one worker of a sweep takes."""

    what: str
    cpus: float
    gpus: float
    memory: int

    def __str__(self) -> str:
        return f"{self.what} ({_res(self.cpus, self.gpus, self.memory)})"

    def lacking(self, total: dict[str, float]) -> list[str]:
        """What ``total`` has not got. It is as Ray counts: {"CPU": 2, "memory": bytes}."""
        out = []
        for kind, needed in (("CPU", self.cpus), ("GPU", self.gpus)):
            if needed > total.get(kind, 0):
                out.append(
                    f"{self.what} takes {needed:g} {kind}{'s' if needed > 1 else ''}, and there "
                    f"{'is' if total.get(kind, 0) == 1 else 'are'} {total.get(kind, 0):g}"
                )
        if self.memory > total.get("memory", 0):
            out.append(
                f"{self.what} takes {size_text(self.memory)} of memory, and there are "
                f"{size_text(total.get('memory', 0))}"
            )
        return out


def needs(config: SweepConfig, *, experts_only: bool = False) -> list[Need]:
    """What an expert takes, and what a trial does."""
    r = config.resources
    gpus = 1.0 if r.expert_gpus is None else r.expert_gpus  # to measure a share takes a whole one
    workers = [
        Need("an expert", r.cpus_per_expert, gpus, r.expert_memory),
        Need("a trial", r.cpus_per_trial, r.gpus_per_trial, r.trial_memory),
    ]
    return workers[: 1 if experts_only else 2]


def lacking(
    config: SweepConfig, total: dict[str, float], *, experts_only: bool = False
) -> list[str]:
    """Resources that one expert or one trial needs and ``total`` has not."""
    return [x for need in needs(config, experts_only=experts_only) for x in need.lacking(total)]


def lacking_compiler(config: SweepConfig, *, experts_only: bool = False) -> list[str]:
    """That this machine cannot use the native backend, where workers were told to."""
    r = config.resources
    workers = [("an expert", r.expert_numerics), ("a trial", r.trial_numerics)]
    asked = workers[: 1 if experts_only else 2]
    named = [what for what, numerics in asked if numerics.backend == "native"]
    why = unavailable() if named else None
    return [] if why is None else [f"{' and '.join(named)}: {why}"]


def machine_resources() -> dict[str, float]:
    """CPUs, GPUs and memory of this machine, without starting Ray."""
    import psutil
    import torch

    return {
        "CPU": float(len(os.sched_getaffinity(0))),
        "GPU": float(torch.cuda.device_count()),
        "memory": float(psutil.virtual_memory().total),
    }


def _missing_lines(lacking: list[str]) -> list[str]:
    return [f"  missing here: {what}" for what in lacking]


def _backend_lines(*workers: Numerics) -> list[str]:
    """How gradients are computed; that a machine lacks a compiler is said here, once."""
    lines = ["gradients  " + ", ".join(sorted({w.backend for w in workers}))]
    if any(w.backend == "eager" and w.device == "cpu" for w in workers) and (why := unavailable()):
        lines.append(f"  several times slower than native. {why}")
    return lines


def _expert_text(config: SweepConfig) -> str:
    r = config.resources
    most = r.max_experts_at_once
    text = f"an expert {_res(r.cpus_per_expert, r.gpus_per_expert, r.expert_memory)}"
    return text if most is None else f"{text} (at most {most} at once)"


def _res(cpus: float, gpus: float | str, memory: int) -> str:
    """What a worker takes: 1 CPU, 0.5 GPU and 2.0 GB."""
    parts = [f"{cpus:g} CPU"]
    if gpus:
        parts.append("a measured share of a GPU" if gpus == "auto" else f"{gpus:g} GPU")
    if memory:
        parts.append(size_text(memory))
    return ", ".join([*parts[:-2], " and ".join(parts[-2:])])
