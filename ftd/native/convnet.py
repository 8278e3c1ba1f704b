"""The ConvNet forwards and backwards, with its directional derivative (ftd.networks.ConvNet).

Second order is forward over reverse. With w(e) = w + e v,

    s = <grad l(w), v> = d/de l(w(e)),   ds/dw = d/de grad_w l(w(e)),   ds/dx = d/de grad_x l(w(e))

at e = 0. So values and their tangents (d/de, ``_d`` behind a name) run through the layers once
forwards and once backwards, and no graph is kept. A layer is

    y = conv(x; W);  hat = (y - mean y) / sqrt(var y + eps);  x' = pool(relu(gamma hat + beta))

The convolution's bias does nothing, as the norm takes the mean away: its derivatives are exactly
0. Arrays have their channels last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ftd.gradients import FLOAT, Gradients, Pass, SecondOrder
from ftd.native.chunks import Workspace, chunk_sizes
from ftd.native.convolution import Chunk, Shape, convolution
from ftd.native.library import kernels
from ftd.networks import ConvNetSpec, Network
from ftd.parallel import each

R = TypeVar("R")

CHUNK = 1_500_000
"""Numbers that the first layer may put out for one chunk of images. It decides about bits, as
kernels.c does: who changes either raises ``ftd.expert.SCHEMA_VERSION``."""

_HELD: dict[Pass, tuple[float, float, float, float]] = {
    "logits": (3, 9, 3, 6),
    "gradient": (5.25, 9, 3, 11),
    "second_order": (10.25, 18, 5, 15),
}
"""What is held at the peak: for each image of a chunk of what the first layer puts out, and of its
pixels; for each image of the batch of its pixels; of the parameters."""

_SPACE = Workspace()
"""Of all networks: a thread works on one chunk at a time."""


@dataclass(frozen=True)
class _Layer:
    """A layer's parameters, or their tangents or gradients."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor


@dataclass(frozen=True)
class _Parameters:
    """A vector (P,) as the layers use it."""

    layers: list[_Layer]
    head: Tensor
    """(K, features)."""
    bias: Tensor


@dataclass(frozen=True)
class _Kept:
    """What the way back needs of a layer; ``hat_d`` and ``q`` are None without tangents."""

    planes: Tensor
    hat: Tensor
    hat_d: Tensor | None
    r: Tensor
    """1 / sqrt(var + eps) of every image and channel, (n, C)."""
    q: Tensor | None
    """r mean(hat (y_d - mean y_d)), (n, C)."""


class NativeGradients(Gradients):
    """``ftd.gradients.Gradients`` of a ConvNet on CPU, in float32 or float64.

    Raises UserError on first use where the machine has no C compiler.
    """

    def __init__(self, network: Network, *, room: int | None = None):
        super().__init__(network, room=room)
        spec = ConvNetSpec.parse(network.name)
        self._width = spec.width
        self._layers = [
            convolution(
                Shape(
                    index=i,
                    side=network.resolution >> i,
                    channels=spec.width if i else network.channels,
                    width=spec.width,
                )
            )
            for i in range(spec.depth)
        ]
        self._limit = self.images_within(CHUNK)

    def bytes_of(self, what: Pass, images: int, threads: int = 1) -> int:
        """What each thread works in, and every chunk's gradients until they are added up."""
        n = self.network
        of_layer, of_patches, of_images, of_pass = _HELD[what]
        sizes = chunk_sizes(images, self._limit, threads)
        pixels = n.channels * n.resolution**2
        of_image = of_layer * n.resolution**2 * self._width + of_patches * pixels
        work = min(threads, len(sizes)) * max(sizes) * of_image
        grads = 0 if what == "logits" else len(sizes)
        return int(FLOAT * (work + of_images * images * pixels + (of_pass + grads) * n.size))

    def images_at_once(self, what: Pass) -> int | None:
        """Any number: its chunks are small, and of one size everywhere."""
        return None

    @torch.no_grad()
    def logits(self, params_P: Tensor, images: Tensor) -> Tensor:
        at = self._parameters(params_P)

        def run(x: Tensor) -> Tensor:
            features, _, _ = self._forward(self._chunk(x), x, at, None)
            return torch.addmm(at.bias, features, at.head.T)

        return torch.cat(self._in_chunks(lambda x, _: run(x), images, None))

    @torch.no_grad()
    def gradient(self, params_P: Tensor, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        at = self._parameters(params_P)
        done = self._in_chunks(lambda x, p: self._gradient(x, p, at), images, targets)
        losses, grads = zip(*done, strict=True)
        return _sum(losses), self._vector(grads)

    @torch.no_grad()
    def second_order(
        self, params_P: Tensor, images: Tensor, targets: Tensor, along_P: Tensor
    ) -> SecondOrder:
        at, along = self._parameters(params_P), self._parameters(along_P)
        done = self._in_chunks(lambda x, p: self._second_order(x, p, at, along), images, targets)
        s, grads, grad_images, grad_targets = zip(*done, strict=True)
        soft = targets.is_floating_point()
        return SecondOrder(
            _sum(s),
            self._vector(grads),
            torch.cat(grad_images).permute(0, 3, 1, 2).contiguous(),
            torch.cat(grad_targets) / len(targets) if soft else None,
        )

    def _in_chunks(
        self, run: Callable[[Tensor, Tensor], R], images: Tensor, targets: Tensor | None
    ) -> list[R]:
        """``run`` of every chunk's images (n, H, W, C) and targets' share in the mean (n, K)."""
        side, channels = self.network.resolution, self.network.channels
        assert images.shape[1:] == (channels, side, side), "kernels check no bounds"
        x = images.permute(0, 2, 3, 1).contiguous()
        p = x.new_empty(len(x), 0) if targets is None else self.shares(targets, x.dtype)
        sizes = chunk_sizes(len(x), self._limit, torch.get_num_threads())
        chunks = list(zip(x.split(sizes), p.split(sizes), strict=True))
        return each(lambda chunk: run(*chunk), chunks)

    def _chunk(self, images: Tensor) -> Chunk:
        return Chunk(len(images), images.dtype, kernels(images.dtype), _SPACE)

    def _gradient(
        self, images: Tensor, p_NK: Tensor, at: _Parameters
    ) -> tuple[Tensor, _Parameters]:
        """(l, dl/dw) of a chunk."""
        chunk = self._chunk(images)
        features, _, kept = self._forward(chunk, images, at, None)
        log_q = torch.addmm(at.bias, features, at.head.T).log_softmax(1)
        g = log_q.exp() * p_NK.sum(1, keepdim=True) - p_NK
        layers, _ = self._backward(chunk, kept, at, None, g @ at.head, None)
        grads = _Parameters(layers, g.T @ features, g.sum(0))
        return -(p_NK * log_q).sum(), grads

    def _second_order(
        self, images: Tensor, p_NK: Tensor, at: _Parameters, along: _Parameters
    ) -> tuple[Tensor, _Parameters, Tensor, Tensor]:
        """(s, ds/dw, ds/dx (n, H, W, C), n ds/dtargets (n, K))."""
        chunk = self._chunk(images)
        features, features_d, kept = self._forward(chunk, images, at, along)
        assert features_d is not None
        q = torch.addmm(at.bias, features, at.head.T).softmax(1)
        z_d = torch.addmm(along.bias, features, along.head.T).addmm_(features_d, at.head.T)
        log_q_d = z_d - (q * z_d).sum(1, keepdim=True)
        share = p_NK.sum(1, keepdim=True)
        g, g_d = q * share - p_NK, q * log_q_d * share
        back = (g @ at.head, torch.addmm(g_d @ at.head, g, along.head))
        layers, grad_images = self._backward(chunk, kept, at, along, *back)
        head_d = torch.addmm(g_d.T @ features, g.T, features_d)
        grads = _Parameters(layers, head_d, g_d.sum(0))
        assert grad_images is not None
        return -(p_NK * log_q_d).sum(), grads, grad_images, -log_q_d

    def _forward(
        self, chunk: Chunk, images: Tensor, at: _Parameters, along: _Parameters | None
    ) -> tuple[Tensor, Tensor | None, list[_Kept]]:
        """(features (n, F), their tangents along ``along``, what the way back needs)."""
        x, x_d, kept = images, None, []
        for i, (conv, layer) in enumerate(zip(self._layers, at.layers, strict=True)):
            n, S, C = chunk.n, conv.shape.side**2 // 4, self._width
            r, out = chunk.array(f"r{i}", n, C), chunk.array(f"x{i}", n * S, C)
            if along is None:
                made = conv.forward(chunk, x, None, layer.weight, None)
                chunk.call("block", made.y, layer.gamma, layer.beta, out, r, n, S, C)
                kept.append(_Kept(made.planes, made.y, None, r, None))
            else:
                layer_d = along.layers[i]
                made = conv.forward(chunk, x, x_d, layer.weight, layer_d.weight)
                assert made.y_d is not None
                q, x_d = chunk.array(f"q{i}", n, C), chunk.array(f"x_d{i}", n * S, C)
                chunk.call(
                    "block_dual", made.y, made.y_d, layer.gamma, layer.beta,
                    layer_d.gamma, layer_d.beta, out, x_d, r, q, n, S, C,
                )  # fmt: skip
                kept.append(_Kept(made.planes, made.y, made.y_d, r, q))
            if not bool((r > 0).all()):  # var is no number or infinite, and the kernels hide it
                out.fill_(torch.nan)
            x = out
        return x.view(chunk.n, -1), None if x_d is None else x_d.view(chunk.n, -1), kept

    def _backward(
        self,
        chunk: Chunk,
        kept: list[_Kept],
        at: _Parameters,
        along: _Parameters | None,
        x: Tensor | None,
        x_d: Tensor | None,
    ) -> tuple[list[_Layer], Tensor | None]:
        """(gradients of the layers, and of the images), or the tangents of both if there are any.

        ``x`` and ``x_d`` are gradients here: of the features, then of each layer's input.
        """
        grads = []
        for i in reversed(range(len(kept))):
            conv, layer, was = self._layers[i], at.layers[i], kept[i]
            n, S, C = chunk.n, conv.shape.side**2 // 4, self._width
            gamma, beta = torch.zeros_like(layer.gamma), torch.zeros_like(layer.beta)
            y, y_d, weight_d = chunk.array("y_g", n * S * 4, C), None, None
            assert x is not None
            if along is None:
                chunk.call(
                    "block_back", was.hat, layer.gamma, layer.beta, was.r, x, y,
                    gamma, beta, n, S, C,
                )  # fmt: skip
            else:
                assert x_d is not None and was.hat_d is not None and was.q is not None
                y_d, weight_d = chunk.array("y_g_d", n * S * 4, C), along.layers[i].weight
                chunk.call(
                    "block_back_dual", was.hat, was.hat_d, layer.gamma, layer.beta,
                    along.layers[i].gamma, was.r, was.q, x, x_d, y, y_d, gamma, beta, n, S, C,
                )  # fmt: skip
            back = conv.backward(chunk, was.planes, y, y_d, layer.weight, weight_d)
            x, x_d = back.x, back.x_d
            grads.append(_Layer(conv.filters(back.weight), gamma, beta))
        return grads[::-1], x_d

    def _parameters(self, params_P: Tensor) -> _Parameters:
        """Filters are taken to their domain once, for all chunks."""
        pieces = self.network.pieces(params_P)
        layers = []
        for i, conv in enumerate(self._layers):
            weight, _, gamma, beta = pieces[4 * i : 4 * i + 4]
            filters = weight.permute(2, 3, 1, 0).reshape(9, *weight.shape[1::-1])
            layers.append(_Layer(conv.weight(filters), gamma.contiguous(), beta.contiguous()))
        head, bias = pieces[-2:]
        head = head.view(len(bias), self._width, -1).transpose(1, 2).flatten(1)
        return _Parameters(layers, head, bias)

    def _vector(self, chunks: Sequence[_Parameters]) -> Tensor:
        """The chunks' gradients, whose layers hold filters (9, C, C'), as one vector (P,)."""
        pieces = []
        for layers in zip(*(c.layers for c in chunks), strict=True):
            filters = _sum([layer.weight for layer in layers])
            filters = filters.view(3, 3, *filters.shape[1:]).permute(3, 2, 0, 1)
            gamma, beta = _sum([one.gamma for one in layers]), _sum([one.beta for one in layers])
            pieces += [filters.flatten(), torch.zeros_like(beta), gamma, beta]
        bias = _sum([c.bias for c in chunks])
        head = _sum([c.head for c in chunks]).view(len(bias), -1, self._width).transpose(1, 2)
        return torch.cat([*pieces, head.flatten(), bias])


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """In order, so that the bits do not depend on which thread was faster."""
    total = parts[0] if len(parts) == 1 else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
