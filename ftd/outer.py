"""The outer optimiser: how images, soft labels and eta descend the matching loss L.

x = images (n, C, H, W), y = logits of soft labels (n, K), eta = the student's learning rate,
mu = ``momentum``, k = outer step from 1, rms(a) = sqrt(mean(a^2)).

``sgd`` is the paper's (MTT Alg. 1, FTD): SGD with momentum on L,

    v <- mu v + dL/dx;  x <- x - lr_img v          likewise y with lr_label, eta with lr_lr

whose learning rates have units: dL/dx and dL/deta scale with the loss, N, M, IPC, the resolution
and the experts, so that rates which suit one configuration are fatal to the next.

``rmsprop`` has rates without units. It descends log L, and eta = exp(u) cannot leave (0, inf):

    g = (dL/dx) / L,  of each image by itself
    s <- beta s + (1 - beta) rms(g)^2;  r = max(sqrt(s / (1 - beta^k)), rms(g))
    v <- mu v + g / r;  x <- x - (lr_img sigma / IPC) v
    likewise y with lr_label, and u with lr_lr and g = eta (dL/deta) / L

This is RMSProp with momentum (Tieleman & Hinton, 2012; torch.optim.RMSprop) with one running mean
square an image (as Adam-mini's blocks, Zhang et al., ICLR 2025), corrected for its start as Adam's
(Kingma & Ba, ICLR 2015). sigma is the standard deviation of the pixels in network space (of the
first logits for y): ``lr_img`` is what a gradient changes the images of a class by, taken together,
in standard deviations, ``lr_lr`` the share by which it changes eta. Momentum makes at most
1 / (1 - mu) of it in one step, since the maximum in r keeps a gradient that grows suddenly from a
leap. d log L / d log eta has no unit to begin with, but where images are still of little use,
L is near 1 whatever eta is: without r, eta would creep for hundreds of steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftd.expert import sgd_step

OPTIMISERS = ("sgd", "rmsprop")

SQUARE_DECAY = 0.9
"""beta of the running mean squares."""


@dataclass(frozen=True, eq=False)
class Descent:
    """What the optimiser remembers of images, logits or log eta."""

    velocity: Tensor | None = None
    square: Tensor | None = None
    """(n,) running mean square of each image's gradient; of ``rmsprop``."""


def rmsprop_step(
    values: Tensor,
    grad: Tensor,
    memory: Descent,
    *,
    step: int,
    lr: float | Tensor,
    momentum: float,
) -> tuple[Tensor, Descent]:
    """One step of ``rmsprop`` for values (n, ...): the new values, and what to remember.

    ``grad`` is that of log L; ``step`` counts from 1; ``lr`` is lr_img sigma / IPC.
    """
    now = grad.square().flatten(1).mean(1)
    before = torch.zeros_like(now) if memory.square is None else memory.square
    square = SQUARE_DECAY * before + (1 - SQUARE_DECAY) * now
    largest = torch.maximum(square / (1 - SQUARE_DECAY**step), now).sqrt()
    scale = torch.where(largest > 0, largest, 1.0)  # an image that no student step has seen yet
    scaled = grad / scale.view(-1, *[1] * (grad.ndim - 1))
    values, velocity = sgd_step(values, scaled, memory.velocity, lr=lr, momentum=momentum)
    return values, Descent(velocity, square)


def log_lr_step(
    syn_lr: Tensor, grad: Tensor, memory: Descent, *, step: int, lr: float, momentum: float
) -> tuple[Tensor, Descent]:
    """One step of ``rmsprop`` for eta = exp(u); ``grad`` is that of log L with respect to eta."""
    slope = (syn_lr * grad).view(1, 1)  # one image of one pixel
    change, new = rmsprop_step(
        torch.zeros_like(slope), slope, memory, step=step, lr=lr, momentum=momentum
    )
    return syn_lr * change[0, 0].exp(), new
