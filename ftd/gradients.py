"""What the algorithm asks of a network: its mean cross-entropy and the derivatives of that.

l(w) = mean over images of the cross-entropy of network(w, image) with its target

An expert and a fresh network need grad l; matching needs second derivatives as well, though only
along one direction v at a time (ftd.matching). A *backend* is a way to compute them:

- ``eager``: autograd, operation by operation. ``Gradients`` itself, the specification.
- ``native``: on CPU, the ConvNet differentiated by hand over kernels in C (ftd.native).
- ``compiled``: autograd traced once and compiled by torch.compile (ftd.compiled).

They agree up to rounding, and each gives the same bits again. Which one is used is chosen by
configuration and recorded, never by timing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ftd.networks import ConvNetSpec, Network


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

    Images are (N, C, H, W); targets (N,) classes or (N, K) probabilities.
    """

    def __init__(self, network: Network):
        self.network = network

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
        return self.network(params_P, images)

    @torch.enable_grad()
    def gradient(self, params_P: Tensor, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(l, dl/dw (P,))."""
        params_P = params_P.detach().requires_grad_()
        loss = self.loss(params_P, images, targets)
        (grad_P,) = torch.autograd.grad(loss, params_P)
        return loss.detach(), grad_P

    @torch.enable_grad()
    def second_order(
        self, params_P: Tensor, images: Tensor, targets: Tensor, along_P: Tensor
    ) -> SecondOrder:
        """s and its derivatives for the direction v = ``along_P``."""
        wanted = [t.detach().requires_grad_() for t in (params_P, images)]
        if targets.is_floating_point():
            targets = targets.detach().requires_grad_()
            wanted.append(targets)
        loss = self.loss(wanted[0], wanted[1], targets)
        (grad_P,) = torch.autograd.grad(loss, wanted[0], create_graph=True)
        s = grad_P @ along_P
        grads = torch.autograd.grad(s, wanted)
        return SecondOrder(s.detach(), grads[0], grads[1], grads[2] if len(grads) > 2 else None)
