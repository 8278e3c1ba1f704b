"""How much memory a sweep's workers take, and how many of them fit: the plan's lines about it.

These are estimates (``ftd.memory``), a little above what was measured on CPUs; a share that is
measured on the GPU itself (resources.gpus_per_expert: auto) does not use them.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ftd.data.dataset import Description
from ftd.expert import ExpertConfig
from ftd.memory import Need, expert_need, final_need, trial_need
from ftd_ray.config import SweepConfig
from ftd_ray.experts.shares import EXPERTS_PER_GPU, GPU_HEADROOM
from ftd_ray.store.text import plural, size_text

GIVEN = tuple(size * 10**9 for size in (16, 24, 40, 80))
"""GPUs that a plan speaks of where none is at hand."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: its name, and the bytes that it has."""

    name: str
    total: int

    def __str__(self) -> str:
        return f"{self.name} of {size_text(self.total)}"


@dataclass(frozen=True)
class Machine:
    """What this machine has for workers."""

    memory: int
    gpus: tuple[Gpu, ...] = ()
    cpus: int = 1

    def __str__(self) -> str:
        return f"{plural(self.cpus, 'CPU')}, {size_text(self.memory)}"


@dataclass(frozen=True)
class Worker:
    """A kind of worker, with the most that one of the sweep takes."""

    kind: str
    """expert or trial."""
    need: Need
    gpus: float | None
    """Its share of a GPU; None for one that is measured."""
    booked: int
    """Memory booked for it on its node; 0 for none."""
    smaller: str
    """What to lower, where it does not fit."""
    cpus: float = 1
    most: int = 1
    """As many work at a time, if they have room."""

    def __str__(self) -> str:
        return f"{'an' if self.kind == 'expert' else 'a'} {self.kind}"

    @property
    def where(self) -> str:
        return " of a GPU" if self.gpus != 0 else ""

    @property
    def limited(self) -> bool:
        """Whether its batches are cut to anything."""
        return self.gpus != 0 or self.booked > 0

    @property
    def takes(self) -> int:
        """What it takes where it fits."""
        return self.need.total if self.limited else self.need.uncut

    @property
    def least(self) -> int:
        """What it cannot do without: second order is cut before a trial fails."""
        return self.need.least if self.limited and self.kind == "trial" else self.takes

    def started(self, machine: Machine) -> int:
        """How many are started at a time on a machine's CPUs; only what is booked bounds memory."""
        room = int(machine.cpus / self.cpus + 1e-9)
        return min(self.most, room, machine.memory // self.booked if self.booked else room)

    def holding(self, machine: Machine) -> int:
        """How many of those its memory holds."""
        return min(self.started(machine), machine.memory // self.least)

    def fitting(self, total: int) -> int:
        """How many of them fit on a GPU of ``total`` bytes."""
        if self.gpus is None:
            return min(int(total * GPU_HEADROOM) // self.need.total, EXPERTS_PER_GPU)
        return int(1 / self.gpus + 1e-9) if self.least <= self.share_of(total) else 0

    def share_of(self, total: int) -> int:
        """What one of them may take of a GPU of ``total`` bytes at most."""
        share = 1.0 if self.gpus is None else self.gpus
        return int(total * (GPU_HEADROOM if share == 1 else share))


def this_machine() -> Machine:
    """Memory and kinds of GPU of this machine, without starting Ray."""
    import psutil
    import torch

    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    gpus = dict.fromkeys(Gpu(p.name, p.total_memory) for p in found)
    cpus = len(os.sched_getaffinity(0))
    return Machine(int(psutil.virtual_memory().total), tuple(gpus), cpus)


def workers(config: SweepConfig, data: Description, *, experts_only: bool = False) -> list[Worker]:
    """The kinds of worker of a sweep, each at the point of the space where it takes the most."""
    r = config.resources
    need = max(_expert_needs(config, data), key=lambda need: need.total)
    batch = max(config.values_of("experts.batch_size"))
    wanted = sum(experts.count for _, experts in config.expert_points())
    found = [
        Worker(
            kind="expert",
            need=need,
            gpus=r.expert_gpus,
            booked=r.expert_memory,
            smaller=f"experts.batch_size={batch}",
            cpus=r.cpus_per_expert,
            most=min(wanted, r.max_experts_at_once or wanted),
        )
    ]
    if not experts_only:
        found.append(
            Worker(
                kind="trial",
                need=max(_trial_needs(config, data), key=lambda need: need.total),
                gpus=r.gpus_per_trial,
                booked=r.trial_memory,
                smaller="distill.batch_syn or evaluate.batch_size",
                cpus=r.cpus_per_trial,
                most=config.search.concurrency,
            )
        )
    return found


def memory_lines(
    config: SweepConfig,
    data: Description,
    machine: Machine | None = None,
    *,
    experts_only: bool = False,
) -> list[str]:
    """What workers take, how many fit, and who cannot. ``machine`` is None for a cluster."""
    found = workers(config, data, experts_only=experts_only)
    on_gpus, on_cpus = [w for w in found if w.gpus != 0], [w for w in found if w.gpus == 0]
    gpus = machine.gpus if machine else ()
    takes = ", ".join(f"{w} about {_about(w.takes)}{w.where}" for w in found)
    lines = [f"memory     {takes}"]
    if on_gpus:
        sizes = [(str(gpu), gpu.total) for gpu in gpus] or [
            (f"{size // 10**9} GB", size) for size in GIVEN
        ]
        fits = "; ".join(
            f"{name}: {_counts(on_gpus, size, named=i == 0)}"
            for i, (name, size) in enumerate(sizes)
        )
        lines.append(f"  on {'' if gpus else 'a GPU of '}{fits}")
    if on_cpus and machine is not None:
        room = " or ".join(plural(w.holding(machine), w.kind) for w in on_cpus)
        lines.append(f"  on this machine ({machine}): {room} at a time")
    for w in found:
        lines += [f"  does not fit: {why}" for why in _misfits(w, gpus)]
    if machine is not None:
        lines += [f"  does not fit: {why}" for w in on_cpus for why in _too_large(w, machine)]
    return lines


def _about(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _counts(found: Sequence[Worker], total: int, *, named: bool) -> str:
    counts = [(w.fitting(total), w.kind) for w in found]
    return " or ".join(plural(n, kind) if named else str(n) for n, kind in counts)


def _misfits(w: Worker, gpus: Sequence[Gpu]) -> Iterator[str]:
    """Why a worker does not fit where it is to work, each with what to do about it."""
    key, what = f"resources.gpus_per_{w.kind}", f"{w} takes about {_about(w.least)}"
    for gpu in gpus if w.gpus != 0 else ():
        room = w.share_of(gpu.total)
        if w.least <= room:
            continue
        whole = int(gpu.total * GPU_HEADROOM)
        if w.least > whole:
            remedy = f"Lower {w.smaller}, or the network's width."
            yield f"{what}, and there is {gpu}. {remedy}"
        else:
            raise_it = f"Raise it to {1 / (whole // w.least):.3g}"
            yield (
                f"{what}, and {key}={w.gpus:g} of {gpu} is {size_text(room)}. {raise_it}"
                + (", or write auto." if w.kind == "expert" else ".")
            )
    if w.gpus and not gpus and w.gpus < 1:
        least = w.least / w.gpus
        if least > GIVEN[0]:
            yield (
                f"{what}, so {key}={w.gpus:g} is enough only on GPUs of {size_text(least)} "
                "or more. Raise it for smaller ones"
                + (", or write auto." if w.kind == "expert" else ".")
            )
    if w.gpus == 0 and 0 < w.booked < w.least:
        yield (f"{what}, and resources.memory_per_{w.kind} books {size_text(w.booked)}. Raise it.")


def _too_large(w: Worker, machine: Machine) -> Iterator[str]:
    """Why a machine's memory does not hold what is started on its CPUs."""
    holds, has = w.holding(machine), f"this machine has {size_text(machine.memory)}"
    if w.least > machine.memory:
        yield (
            f"{w} takes about {_about(w.least)}, and {has}. Lower {w.smaller}, or the network's "
            "width."
        )
    elif holds < (count := w.started(machine)):
        yield (
            f"{plural(count, w.kind)} at a time take about {_about(count * w.least)}, and {has}. "
            f"Set resources.memory_per_{w.kind}={math.ceil(w.least / 1e8) / 10:g}GB: no more are "
            "started then than it holds."
        )


def _expert_needs(config: SweepConfig, data: Description) -> Iterator[Need]:
    batch = max(config.values_of("experts.batch_size"))
    numerics, zca = config.resources.expert_numerics, config.dataset.zca
    for network in dict.fromkeys(config.values_of("experts.network")):
        yield expert_need(ExpertConfig(network=network, batch_size=batch), data, numerics, zca=zca)


def _trial_needs(config: SweepConfig, data: Description) -> Iterator[Need]:
    """At every combination of what matters; the final evaluation is work of trials' workers."""
    evaluate, numerics, zca = config.evaluate, config.resources.trial_numerics, config.dataset.zca
    largest = {k: max(config.values_of(f"distill.{k}")) for k in ("ipc", "syn_steps")}
    for network, batch, gradient in product(
        dict.fromkeys(config.values_of("experts.network")),
        dict.fromkeys(config.values_of("distill.batch_syn")),
        dict.fromkeys(config.values_of("distill.gradient")),
    ):
        distill = replace(config.distill, **largest, batch_syn=batch, gradient=gradient)
        yield trial_need(network, distill, evaluate, data, numerics, zca=zca)
    for network in dict.fromkeys(config.values_of("experts.network")):
        images = largest["ipc"] * data.classes
        yield final_need(network, images, evaluate, data, numerics, zca=zca)
