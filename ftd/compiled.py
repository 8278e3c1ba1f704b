"""Gradients traced once and compiled by torch.compile, for GPUs (and CPUs with a C++ compiler).

Both orders are nested ``torch.func.grad``, so that all of a step, second derivatives included, is
one graph without autograd's own bookkeeping. A batch is cut into chunks of one size, the last
one filled up with images that weigh nothing: hyperparameters and the number of steps never
compile anything anew, and batch sizes only where they ask for another size of chunk. What was
compiled lies in the node's cache (``$FTD_CACHE``), where all its processes find it.
"""

import os
from collections.abc import Callable
from functools import cached_property
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftd.data.cache import cache_root
from ftd.errors import UserError
from ftd.gradients import FLOAT, Gradients, Pass, SecondOrder
from ftd.networks import Network

CHUNK = 2**26
"""Numbers that the first layer may put out for one chunk: about 4 GB in second order."""
SIZES = 1024
"""Sizes of chunks that a process may compile, of all its networks."""
MULTIPLE = 16
"""Sizes of smaller batches are rounded up to a multiple of it, so that few sizes exist."""


class CompiledGradients(Gradients):
    """``ftd.gradients.Gradients`` over torch.compile. ``engine`` is torch.compile's backend."""

    def __init__(
        self,
        network: Network,
        engine: str | Callable[..., Any] = "inductor",
        *,
        room: int | None = None,
    ):
        super().__init__(network, room=room)
        self._limit = self.images_within(CHUNK)
        self._engine = engine

    def bytes_of(self, what: Pass, images: int, threads: int = 1) -> int:
        """As autograd's for a chunk, whose graph this is, and the chunks' results."""
        if what == "logits":
            return super().bytes_of(what, images)
        n = self.network
        results = 2 * images * (n.channels * n.resolution**2 + n.classes) + 2 * n.size
        return super().bytes_of(what, min(images, self._limit)) + FLOAT * results

    def gradient(self, params_P: Tensor, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad_P = params_P.new_zeros(()), torch.zeros_like(params_P)
        for x, p in self._chunks(images, targets):
            part, of_part = self._run(self._gradient, params_P, x, p)
            loss += part
            grad_P += of_part
        return loss, grad_P

    def second_order(
        self, params_P: Tensor, images: Tensor, targets: Tensor, along_P: Tensor
    ) -> SecondOrder:
        s, grad_P = params_P.new_zeros(()), torch.zeros_like(params_P)
        of_images, of_targets = [], []
        for x, p in self._chunks(images, targets):
            part, by_params, by_images, by_targets = self._run(
                self._second_order, params_P, x, p, along_P
            )
            s += part
            grad_P += by_params
            of_images.append(by_images)
            of_targets.append(by_targets)
        n, soft = len(images), targets.is_floating_point()
        grad_targets = torch.cat(of_targets)[:n] / n if soft else None
        return SecondOrder(s, grad_P, torch.cat(of_images)[:n], grad_targets)

    def _chunks(self, images: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Chunks of one size: images, and each target's share in the mean (size, K)."""
        n = len(images)
        size = min(self._limit, ceil(n / MULTIPLE) * MULTIPLE)
        fill = -n % size
        x = F.pad(images, (0, 0, 0, 0, 0, 0, 0, fill))
        p = F.pad(self.shares(targets, images.dtype), (0, 0, 0, fill))
        return list(zip(x.split(size), p.split(size), strict=True))

    def _weighted(self, params_P: Tensor, x: Tensor, p: Tensor) -> Tensor:
        return -(p * self.network(params_P, x).log_softmax(1)).sum()

    @cached_property
    def _gradient(self) -> Callable[..., tuple[Tensor, Tensor]]:
        def both(params_P: Tensor, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
            grad_P, loss = torch.func.grad_and_value(self._weighted)(params_P, x, p)
            return loss, grad_P

        return self._compile(both)

    @cached_property
    def _second_order(self) -> Callable[..., tuple[Tensor, ...]]:
        def inner(params_P: Tensor, x: Tensor, p: Tensor, along_P: Tensor) -> Tensor:
            return torch.func.grad(self._weighted)(params_P, x, p) @ along_P

        def all_of(params_P: Tensor, x: Tensor, p: Tensor, along_P: Tensor) -> tuple[Tensor, ...]:
            whole = torch.func.grad_and_value(inner, argnums=(0, 1, 2))
            grads, s = whole(params_P, x, p, along_P)
            return s, *grads

        return self._compile(all_of)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
        return torch.compile(function, dynamic=False, fullgraph=True, backend=self._engine)

    def _run(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        try:
            with torch._dynamo.config.patch(
                recompile_limit=SIZES, accumulated_recompile_limit=SIZES
            ):
                return function(*(a.detach() for a in arguments))
        except (
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,
        ) as error:
            cause = getattr(error, "inner_exception", error)
            said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise UserError(
                f"torch.compile cannot compile here ({said}). Install what it asks for (a C++ "
                "compiler, Triton for a GPU), or take backend eager."
            ) from error
