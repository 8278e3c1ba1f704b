"""Experts: networks trained on real data whose parameters after every epoch are a trajectory.

theta*_e -> ``Snapshot.params_P`` of epoch e = 0 ... E. Plain SGD on top of a sharpness-aware
gradient (``ftd.sharpness``); FTD's flat trajectories are those with rho > 0.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ftd import augment
from ftd.backends import gradients_for, resolve
from ftd.data import Dataset, Split
from ftd.data.dataset import Description
from ftd.errors import Diverged, UserError
from ftd.gradients import Gradients
from ftd.memory import CLASSIFIED, room_for_expert
from ftd.networks import ConvNetSpec, Network, build_network
from ftd.seeds import derive_seed, generator
from ftd.sharpness import SHARPNESS, sharp_grad
from ftd.trajectory import set_key

__all__ = [
    "ExpertConfig", "Numerics", "Snapshot", "accuracy", "identity", "network_for", "set_key",
    "sgd_step", "train_expert",
]  # fmt: skip

SCHEMA_VERSION = 1
"""Of what an expert is: raise it when the same configuration no longer gives the same expert."""


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """How experts are trained. Defaults are the field's (FTD Table 7)."""

    network: str = "ConvNetD3"
    """ConvNetD<depth>, with W<width> behind it for another width than 128."""
    count: int = 100
    """Experts to have. More of them later only adds: it is no part of an expert set's key."""
    epochs: int = 50
    """Epochs of each trajectory. More of them later only adds, too."""
    lr: float = 0.01
    """SGD learning rate, constant."""
    batch_size: int = 256
    momentum: float = 0.0
    weight_decay: float = 0.0
    sharpness: str = "sam"
    """none (MTT), sam, asam, gsam (L2 ball) or gsam_adaptive (ASAM's ball)."""
    rho: float | None = None
    """Radius of the sharpness ball; 0.01 unless sharpness is none. 0 is plain SGD."""
    sharpness_weight: float = 1.0
    """FTD's alpha: the gradient is g + alpha (g_p - g). For sam and asam."""
    gsam_alpha: float = 0.0
    """GSAM's a: how much of g's component across g_p is taken away. For gsam*."""
    seed: int = 0
    """Expert i draws from (seed, i) alone, so sets that differ in rho are paired."""

    def __post_init__(self) -> None:
        ConvNetSpec.parse(self.network)
        if self.sharpness not in SHARPNESS:
            raise UserError(
                f"experts.sharpness={self.sharpness!r} is not known. "
                f"Take one of {', '.join(SHARPNESS)}."
            )
        if self.rho is None:
            object.__setattr__(self, "rho", 0.0 if self.sharpness == "none" else 0.01)
        for key in ("lr", "momentum", "weight_decay", "rho", "sharpness_weight", "gsam_alpha"):
            object.__setattr__(self, key, float(getattr(self, key)))  # 0 and 0.0 are one key
        at_least = {"count": 1, "epochs": 1, "batch_size": 1, "seed": 0}
        for key, least in at_least.items():
            if getattr(self, key) < least:
                raise UserError(f"experts.{key}={getattr(self, key)} must be at least {least}.")
        for key in ("momentum", "weight_decay", "rho", "sharpness_weight", "gsam_alpha"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise UserError(
                    f"experts.{key}={getattr(self, key)} must be 0 or more, and finite."
                )
        if not 0 < self.lr < float("inf"):
            raise UserError(f"experts.lr={self.lr} must be above 0, and finite.")
        if self.momentum >= 1:
            raise UserError(f"experts.momentum={self.momentum} must be below 1.")
        if self.sharpness == "none" and self.rho:
            raise UserError(
                f"experts.rho={self.rho} has no effect with experts.sharpness=none. "
                "Leave rho out, or take sharpness sam, asam, gsam or gsam_adaptive."
            )
        if self.gsam_alpha and not self.sharpness.startswith("gsam"):
            raise UserError(
                f"experts.gsam_alpha={self.gsam_alpha} has no effect with experts.sharpness="
                f"{self.sharpness}. Take gsam or gsam_adaptive, or mean sharpness_weight."
            )
        if self.sharpness_weight != 1 and self.sharpness not in ("sam", "asam"):
            raise UserError(
                f"experts.sharpness_weight={self.sharpness_weight} has no effect with "
                f"experts.sharpness={self.sharpness}. Take sam or asam."
            )

    @property
    def radius(self) -> float:
        """rho, after its default."""
        assert self.rho is not None
        return self.rho


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What changes bits without changing the mathematics; part of an expert set's identity."""

    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 1
    """Threads of a CPU worker; 0 on cuda, where they do not matter."""
    backend: str = "eager"
    """How gradients are computed (ftd.backends)."""

    @classmethod
    def on(cls, device: str, threads: int, backend: str = "auto") -> "Numerics":
        backend = resolve(backend, device)
        return cls(device=device, threads=threads if device == "cpu" else 0, backend=backend)

    def apply(self) -> torch.device:
        """Sets this process up accordingly."""
        if self.device == "cpu":
            torch.set_num_threads(self.threads)
        else:  # float32 means float32: TF32 keeps 10 bits, and second derivatives need more
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        return torch.device(self.device)


def identity(
    config: ExpertConfig,
    data: Description,
    strategy: str,
    numerics: Numerics,
    precision: str = "float32",
) -> dict[str, Any]:
    """All that shapes an expert's weights, and the ``precision`` that snapshots are kept in; not
    how many experts or epochs are wanted."""
    shaped = {f.name for f in fields(config)} - {"count", "epochs"}
    experts = {k: v for k, v in asdict(config).items() if k in shaped}
    if config.radius == 0:  # plain SGD by whatever name
        experts |= {"sharpness": "none", "rho": 0.0, "sharpness_weight": 1.0, "gsam_alpha": 0.0}
    elif config.sharpness.startswith("gsam") and config.gsam_alpha == 0:
        experts["sharpness"] = "sam" if config.sharpness == "gsam" else "asam"
    bits = asdict(numerics)
    if numerics.backend == "eager":  # sets from before there were others keep their key
        del bits["backend"]
    who = {
        "schema": SCHEMA_VERSION,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "shape": [data.channels, data.resolution, data.resolution],
            "classes": data.classes,
        },
        "augment": strategy,
        "experts": experts,
        "numerics": bits | {"precision": "float32", "torch": str(torch.__version__)},
    }
    return who if precision == "float32" else who | {"snapshots": precision}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An expert after ``epoch`` epochs: all that training goes on from."""

    epoch: int
    params_P: Tensor
    momentum_P: Tensor | None
    train_loss: float
    """Mean over the epoch's batches; NaN at epoch 0."""
    val_accuracy: float


def network_for(name: str, data: Description) -> Network:
    """The network ``name`` for images and classes of ``data``."""
    return build_network(
        name, channels=data.channels, resolution=data.resolution, classes=data.classes
    )


def train_expert(
    config: ExpertConfig,
    data: Dataset,
    index: int,
    *,
    epochs: int,
    resume: Snapshot | None = None,
    device: torch.device | str = "cpu",
    backend: str = "eager",
) -> Iterator[Snapshot]:
    """Trains expert ``index`` and yields a snapshot after each epoch up to ``epochs``.

    From scratch the first snapshot is epoch 0, the initialisation; with ``resume`` it is the
    epoch after that snapshot, and the bits are those of an uninterrupted run. ``data`` lies on
    ``device``; snapshots are CPU copies. Raises Diverged when the loss is not finite.
    """
    device = torch.device(device)
    seed = derive_seed(config.seed, "expert", index)
    network = network_for(config.network, data.description)
    gradients = gradients_for(network, backend, room=room_for_expert(network, data))
    if resume is None:
        w = gradients.network.init(generator(seed, "init")).to(device)
        velocity = None
        yield _snapshot(0, w, velocity, float("nan"), accuracy(gradients, w, data.val))
        first = 1
    else:
        w = resume.params_P.clone().to(device)
        velocity = None if resume.momentum_P is None else resume.momentum_P.clone().to(device)
        first = resume.epoch + 1
    for epoch in range(first, epochs + 1):
        gen = generator(seed, "epoch", epoch)
        losses = []
        order = torch.randperm(len(data.train), generator=gen)
        for i in order.split(config.batch_size):
            draw = augment.draw(data.strategy, len(i), gen)
            i = i.to(device)
            x = augment.apply(draw and draw.to(device), data.train.batch(i))
            y = data.train.labels[i]

            def grad_fn(params_P: Tensor, x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
                return gradients.gradient(params_P, x, y)

            loss, g = sharp_grad(
                grad_fn,
                w,
                sharpness=config.sharpness,
                rho=config.radius,
                sharpness_weight=config.sharpness_weight,
                gsam_alpha=config.gsam_alpha,
            )
            w, velocity = sgd_step(
                w,
                g,
                velocity,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
            losses.append(loss)
        train_loss = torch.stack(losses).mean().item()
        if not (train_loss < float("inf") and bool(w.isfinite().all())):
            raise Diverged(
                f"expert {index} diverged in epoch {epoch} (training loss {train_loss}). "
                f"Lower experts.lr={config.lr} or experts.rho={config.rho}."
            )
        yield _snapshot(epoch, w, velocity, train_loss, accuracy(gradients, w, data.val))


def sgd_step(
    params_P: Tensor,
    grad_P: Tensor,
    velocity_P: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """torch.optim.SGD's step as a function: (new parameters, new velocity)."""
    if weight_decay:
        grad_P = grad_P + weight_decay * params_P
    if momentum:
        velocity_P = grad_P if velocity_P is None else momentum * velocity_P + grad_P
        grad_P = velocity_P
    return params_P - lr * grad_P, velocity_P


@torch.no_grad()
def accuracy(
    gradients: Gradients, params_P: Tensor, split: Split, batch_size: int = CLASSIFIED
) -> float:
    """Fraction of ``split`` that the network classifies correctly."""
    right = 0
    everything = torch.arange(len(split), device=params_P.device)
    for i in everything.split(min(batch_size, gradients.images_at_once("logits") or batch_size)):
        logits = gradients.logits(params_P, split.batch(i))
        right += int((logits.argmax(1) == split.labels[i]).sum())
    return right / len(split)


def _snapshot(
    epoch: int, w: Tensor, velocity: Tensor | None, loss: float, val_accuracy: float
) -> Snapshot:
    def copy(tensor: Tensor) -> Tensor:  # on CPU, .cpu() alone would alias live parameters
        return tensor.detach().to("cpu", copy=True)

    return Snapshot(
        epoch, copy(w), None if velocity is None else copy(velocity), loss, val_accuracy
    )
