"""What a sweep is going to do, worked out before anything is started."""

import os
import shutil
from dataclasses import dataclass
from math import prod

from ftd.data import describe
from ftd.data.dataset import Description
from ftd.expert import ExpertConfig, network_for, set_key
from ftd_ray.config import SweepConfig
from ftd_ray.pictures import short_names
from ftd_ray.progress import describe_params
from ftd_ray.storage import is_local, open_uri
from ftd_ray.store import TrajectoryStore

BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class PlannedSet:
    """One distinct expert set of the space."""

    key: str
    params: dict[str, object]
    experts: ExpertConfig
    present: int
    """Experts that the store has already, with all their epochs."""
    parameters: int

    @property
    def missing(self) -> int:
        return self.experts.count - self.present

    @property
    def bytes_missing(self) -> int:
        """Disk that the missing experts take: a snapshot an epoch, and one of the start."""
        snapshots = self.experts.epochs + 1
        state = 0.2 if self.experts.momentum else 0  # optimiser state, once a part
        return int(self.missing * snapshots * (1 + state) * self.parameters * BYTES_PER_PARAMETER)


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep; ``text`` is what users see."""

    config: SweepConfig
    data: Description
    sets: tuple[PlannedSet, ...]

    @property
    def bytes_missing(self) -> int:
        return sum(s.bytes_missing for s in self.sets)

    def disk_free(self) -> int | None:
        """Bytes free at the store, where it is on this machine."""
        if not is_local(self.config.store.uri):
            return None
        _, path = open_uri(self.config.store.uri)
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        return shutil.disk_usage(path).free

    def text(self, lacking: list[str]) -> str:
        """The plan in lines; ``lacking`` are resources that this machine or cluster lacks."""
        c, d = self.config, self.data
        width = max((len(dim.key) for dim in c.space), default=0)
        points = prod(len(dim.values) for dim in c.space if dim.discrete)
        continuous = any(not dim.discrete for dim in c.space)
        names = short_names(c.space)
        lines = [
            f"sweep      {c.name}",
            f"data       {d.name}, {d.channels} x {d.resolution} x {d.resolution}, "
            f"{d.classes} classes; {d.sizes[0]} train, {d.sizes[1]} validation, {d.sizes[2]} test",
            f"distill    {c.distill.ipc} image{'s' if c.distill.ipc > 1 else ''} per class, "
            f"{c.experts.network}, {c.distill.iterations} outer steps, augment {c.dataset.strategy}"
            + (", ZCA" if c.dataset.zca else ""),
            f"search     {c.search.trials} trials, {c.search.concurrency} at a time, "
            f"{c.search.sampler}, pruner {c.search.pruner}",
        ]
        for dim in c.space:
            lines.append(f"  {dim.key:{width}}  {dim}")
        if c.space:
            many = "infinitely many" if continuous else str(points)
            lines.append(f"  {many} point{'' if points == 1 and not continuous else 's'}")
        built = sum(s.missing for s in self.sets)
        wanted = sum(s.experts.count for s in self.sets)
        lines.append(
            f"experts    {len(self.sets)} distinct set{'s' if len(self.sets) > 1 else ''}, "
            f"{wanted} experts: {wanted - built} in the store, {built} to build"
        )
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
            f"disk       {_size(self.bytes_missing)} for the experts to build"
            + (f", {_size(free)} free" if free is not None else "")
        )
        r = c.resources
        lines.append(
            f"resources  an expert {_res(r.cpus_per_expert, r.gpus_per_expert)}, "
            f"a trial {_res(r.cpus_per_trial, r.gpus_per_trial)}"
        )
        lines += [f"  missing here: {what}" for what in lacking]
        lines += [
            f"store      {c.store.uri}",
            f"tracking   {c.tracking.uri} (experiment {c.experiment})",
            f"output     {c.output_dir}",
        ]
        return "\n".join(lines)


def make_plan(config: SweepConfig) -> Plan:
    """Looks at the data set and the store. Raises UserError when the space does not fit them."""
    data = describe(config.dataset)
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
        present = store.expert_set(identity).complete(experts.epochs)
        sets[key] = PlannedSet(
            key=key,
            params=params,
            experts=experts,
            present=sum(i < experts.count for i in present),
            parameters=network_for(experts.network, data).size,
        )
    return Plan(config, data, tuple(sets.values()))


def lacking(config: SweepConfig, total: dict[str, float]) -> list[str]:
    """Resources that one expert or one trial needs and ``total`` ({"CPU": 2, ...}) has not."""
    r = config.resources
    out = []
    for what, cpus, gpus in (
        ("an expert", r.cpus_per_expert, r.gpus_per_expert),
        ("a trial", r.cpus_per_trial, r.gpus_per_trial),
    ):
        for kind, needed in (("CPU", cpus), ("GPU", gpus)):
            if needed > total.get(kind, 0):
                out.append(
                    f"{what} takes {needed:g} {kind}{'s' if needed > 1 else ''}, and there "
                    f"{'is' if total.get(kind, 0) == 1 else 'are'} {total.get(kind, 0):g}"
                )
    return out


def machine_resources() -> dict[str, float]:
    """CPUs and GPUs of this machine, without starting Ray."""
    import torch

    return {
        "CPU": float(len(os.sched_getaffinity(0))),
        "GPU": float(torch.cuda.device_count()),
    }


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _res(cpus: float, gpus: float) -> str:
    text = f"{cpus:g} CPU"
    return f"{text} and {gpus:g} GPU" if gpus else text
