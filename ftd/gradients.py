"""What the algorithm asks of a network: its mean cross-entropy and the derivatives of that.

l(w) = mean over images of the cross-entropy of network(w, image) with its target

An expert and a fresh network need grad l; matching needs second derivatives as well, though only
along one direction v at a time (ftd.matching). A *backend* is a way to compute them:

- ``eager``: autograd, operation by operation. ``Gradients`` itself, the specification.
- ``native``: on CPU, the ConvNet differentiated by hand over kernels in C (ftd.native).
- ``compiled``: autograd traced once and compiled by torch.compile (ftd.compiled).

They agree up to rounding, and each gives the same bits again. Which one is used is chosen by
configuration and recorded, never by timing.

Memory: A = numbers that the first layer puts out for a batch (images resolution^2 width), I = its
pixels, P = parameters, Z = logits. At its peak autograd holds, in float32 and beside what it is
given (``Gradients.bytes_of``; ftd.memory makes the needs of workers of it):

    logits         2 A + I + P + 2 Z
    gradient       4 A + I + 3 P + 4 Z
    second order   8.75 A + 2 I + 5 P + 8 Z
    unrolled       5.75 A + 3 I + 3 P + 4 Z   of each step but one, in one graph of several
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ftd.networks import ConvNetSpec, Network

Pass = Literal["logits", "gradient", "second_order", "unrolled"]

FLOAT = 4
"""Bytes of a number."""

HELD: dict[Pass, tuple[float, float, float, float]] = {
    "logits": (2, 1, 1, 2),
    "gradient": (4, 1, 3, 4),
    "second_order": (8.75, 2, 5, 8),
    "unrolled": (5.75, 3, 3, 4),
}
"""Of (A, I, P, Z), what autograd holds at its peak."""


@dataclass(frozen=True)
class SecondOrder:
    """s = <grad_w l(w), v> and its derivatives."""

    s: Tensor
    grad_P: Tensor
    """ds/dw, the Hessian's product with v."""
    grad_images: Tensor
    grad_targets: Tensor | None
    """None for class indices."""


class Gradients:
    """l of one network, and what autograd says about it: the backend ``eager``.

    Images are (N, C, H, W); targets (N,) classes or (N, K) probabilities. ``room`` is what logits
    and second order may take of memory, in bytes: larger batches are cut, and the pieces' sums
    added up in order. A gradient is never cut: experts would be others.
    """

    def __init__(self, network: Network, *, room: int | None = None):
        self.network = network
        self.room = room

    def bytes_of(self, what: Pass, images: int, threads: int = 1) -> int:
        """Bytes that a pass over so many images holds at its peak, beside what it is given.

        ``threads`` are those of a backend whose threads take pieces of a batch.
        """
        of_image, of_pass = self._held(what)
        return int(images * of_image + of_pass)

    def images_at_once(self, what: Pass) -> int | None:
        """Images, at least one, that a pass takes at a time; None for any number."""
        if self.room is None:
            return None
        of_image, of_pass = self._held(what)
        return max(1, int((self.room - of_pass) / of_image))

    def _held(self, what: Pass) -> tuple[float, float]:
        """Bytes for each image, and for any number of them."""
        a, i, p, z = HELD[what]
        n = self.network
        width = ConvNetSpec.parse(n.name).width
        of_image = a * n.resolution**2 * width + i * n.channels * n.resolution**2 + z * n.classes
        return FLOAT * of_image, FLOAT * p * n.size

    def shares(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """What each target and class weighs in l, (N, K): l = -<shares, log_softmax(logits)>."""
        hard = not targets.is_floating_point()
        p_NK = F.one_hot(targets, self.network.classes) if hard else targets
        return p_NK.to(dtype) / len(targets)

    def images_within(self, numbers: int) -> int:
        """Images, at least one, for which the first layer puts out at most so many numbers."""
        width = ConvNetSpec.parse(self.network.name).width
        return max(1, numbers // (self.network.resolution**2 * width))

    def loss(self, params_P: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """l, differentiable in all of its arguments: the definition of the rest."""
        return F.cross_entropy(self.network(params_P, images), targets)

    @torch.no_grad()
    def logits(self, params_P: Tensor, images: Tensor) -> Tensor:
        """(N, K)."""
        parts = images.split(self.images_at_once("logits") or max(1, len(images)))
        done = [self.network(params_P, part) for part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)

    @torch.enable_grad()
    def gradient(self, params_P: Tensor, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(l, dl/dw (P,))."""
        params_P = params_P.detach().requires_grad_()
        loss = self.loss(params_P, images, targets)
        (grad_P,) = torch.autograd.grad(loss, params_P)
        return loss.detach(), grad_P

    def second_order(
        self, params_P: Tensor, images: Tensor, targets: Tensor, along_P: Tensor
    ) -> SecondOrder:
        """s and its derivatives for the direction v = ``along_P``."""
        size = self.images_at_once("second_order")
        if size is None or len(images) <= size:
            return self._of_batch(params_P, images, targets, along_P)
        s, grad_P = params_P.new_zeros(()), torch.zeros_like(params_P)
        of_images, of_targets = [], []
        for x, y in zip(images.split(size), targets.split(size), strict=True):
            part, share = self._of_batch(params_P, x, y, along_P), len(x) / len(images)
            s += share * part.s
            grad_P += share * part.grad_P
            of_images.append(share * part.grad_images)
            if part.grad_targets is not None:
                of_targets.append(share * part.grad_targets)
        grad_targets = torch.cat(of_targets) if of_targets else None
        return SecondOrder(s, grad_P, torch.cat(of_images), grad_targets)

    @torch.enable_grad()
    def _of_batch(
        self, params_P: Tensor, images: Tensor, targets: Tensor, along_P: Tensor
    ) -> SecondOrder:
        wanted = [t.detach().requires_grad_() for t in (params_P, images)]
        if targets.is_floating_point():
            targets = targets.detach().requires_grad_()
            wanted.append(targets)
        loss = self.loss(wanted[0], wanted[1], targets)
        (grad_P,) = torch.autograd.grad(loss, wanted[0], create_graph=True)
        s = grad_P @ along_P
        grads = torch.autograd.grad(s, wanted)
        return SecondOrder(s.detach(), grads[0], grads[1], grads[2] if len(grads) > 2 else None)
