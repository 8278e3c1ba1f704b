"""3 x 3 convolutions as products of matrices, with tangents.

A convolution is bilinear: linear maps take its input to V and its output from M, and between
them stands a product, M = V W. With tangents (``_d``) and gradients (``g``), for every V, M, W:

    M = V W            M_d = V_d W + V W_d
    gW = V^T gM        gW_d = V^T gM_d + V_d^T gM
    gV = gM W^T        gV_d = gM_d W^T + gM W_d^T

``Patches`` is the plain way: a row of V is what a filter sees. ``Tiles`` is Winograd's minimal
filtering F(m x m, 3 x 3) (Lavin & Gray, CVPR 2016): k = (m + 2)^2 products, one for each place in
a tile, which together take 2.25 (m = 2) or 4 (m = 4) times fewer multiplications, forwards,
backwards and in second order alike. Outputs are "windows" (n, S, 4, C'), see kernels.c.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftd.native.chunks import Workspace
from ftd.native.library import TYPES, Kernels

_G = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1],
    ],
}  # fmt: skip
"""G of F(m x m, 3 x 3): a filter w (3, 3) is G w G^T in Winograd's domain."""


@dataclass(frozen=True)
class Chunk:
    """Some images on their way through a network, in one thread."""

    n: int
    dtype: torch.dtype
    call: Kernels
    space: Workspace

    def array(self, name: str, *shape: int) -> Tensor:
        return self.space.array(name, self.dtype, *shape)


@dataclass(frozen=True)
class Shape:
    """Of one convolution: which layer, pixels a side, channels in and out."""

    index: int
    side: int
    channels: int
    width: int


@dataclass(frozen=True)
class Forward:
    """What a convolution gives: V for the way back, and its output with its tangent."""

    planes: Tensor
    y: Tensor
    """(n side^2, C')."""
    y_d: Tensor | None


@dataclass(frozen=True)
class Backward:
    """Gradients, each with its tangent if there are tangents: then gW is not wanted, gW_d is."""

    weight: Tensor
    x: Tensor | None
    x_d: Tensor | None


class Patches:
    """V (n side^2, 9 C), W (9 C, C'). The input has no tangent: it is the network's images."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def weight(self, filters: Tensor) -> Tensor:
        """Filters (9, C, C') as W."""
        return filters.reshape(-1, self.shape.width)

    def filters(self, weight: Tensor) -> Tensor:
        """``weight``'s adjoint."""
        return weight.view(9, self.shape.channels, self.shape.width)

    def forward(
        self, at: Chunk, x: Tensor, x_d: Tensor | None, w: Tensor, w_d: Tensor | None
    ) -> Forward:
        rows, size = self._sizes(at)
        planes = at.array("patches", rows, 9 * self.shape.channels)
        at.call("image_to_patches", x, planes, *size)
        y = torch.mm(planes, w, out=at.array(f"y{self.shape.index}", rows, self.shape.width))
        if w_d is None:
            return Forward(planes, y, None)
        y_d = at.array(f"y_d{self.shape.index}", rows, self.shape.width)
        return Forward(planes, y, torch.mm(planes, w_d, out=y_d))

    def backward(
        self,
        at: Chunk,
        planes: Tensor,
        g: Tensor,
        g_d: Tensor | None,
        w: Tensor,
        w_d: Tensor | None,
    ) -> Backward:
        if g_d is None or w_d is None:
            return Backward(planes.T @ g, None, None)
        rows, size = self._sizes(at)
        seen = at.array("patches_g", rows, 9 * self.shape.channels)
        torch.mm(g_d, w.T, out=seen).addmm_(g, w_d.T)
        x_d = torch.zeros(
            at.n, self.shape.side, self.shape.side, self.shape.channels, dtype=g.dtype
        )
        at.call("patches_to_image", x_d, seen, *size)
        return Backward(planes.T @ g_d, None, x_d)

    def _sizes(self, at: Chunk) -> tuple[int, tuple[int, ...]]:
        side = self.shape.side
        return at.n * side * side, (at.n, side, side, self.shape.channels)


class Tiles:
    """V (k, T, C), W (k, C, C'); with tangents V and V_d are the two halves of (k, 2 T, C)."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self._m = 4 if shape.side % 4 == 0 else 2
        self._k = (self._m + 2) ** 2
        g = torch.tensor(_G[self._m], dtype=torch.float64)
        self._to_tiles = {dtype: torch.kron(g, g).to(dtype) for dtype in TYPES}

    def weight(self, filters: Tensor) -> Tensor:
        """Filters (9, C, C') as W."""
        flat = self._to_tiles[filters.dtype] @ filters.reshape(9, -1)
        return flat.view(self._k, self.shape.channels, self.shape.width)

    def filters(self, weight: Tensor) -> Tensor:
        """``weight``'s adjoint."""
        flat = self._to_tiles[weight.dtype].T @ weight.view(self._k, -1)
        return flat.view(9, self.shape.channels, self.shape.width)

    def forward(
        self, at: Chunk, x: Tensor, x_d: Tensor | None, w: Tensor, w_d: Tensor | None
    ) -> Forward:
        s, parts = self.shape, 1 if w_d is None else 2
        V, M = (
            self._planes(at, f"V{s.index}", parts, s.channels),
            self._planes(at, "M", parts, s.width),
        )
        V.take(at, "image_to_planes", x, x_d)
        torch.bmm(V.whole, w, out=M.whole)
        y = at.array(f"y{s.index}", at.n * s.side**2, s.width)
        if w_d is None:
            M.take(at, "planes_to_windows", y)
            return Forward(V.whole, y, None)
        torch.baddbmm(M.parts[1], V.parts[0], w_d, out=M.parts[1])
        y_d = at.array(f"y_d{s.index}", at.n * s.side**2, s.width)
        M.take(at, "planes_to_windows", y, y_d)
        return Forward(V.whole, y, y_d)

    def backward(
        self,
        at: Chunk,
        planes: Tensor,
        g: Tensor,
        g_d: Tensor | None,
        w: Tensor,
        w_d: Tensor | None,
    ) -> Backward:
        s, parts = self.shape, 1 if w_d is None else 2
        M, V = self._planes(at, "M", parts, s.width), self._planes(at, "V_g", parts, s.channels)
        # Tangents come first here, so that [V; V_d]^T [gM_d; gM] is one product.
        first, second = (g, None) if g_d is None else (g_d, g)
        M.take(at, "windows_to_planes", first, second)
        weight = torch.bmm(planes.transpose(1, 2), M.whole, out=at.array("W", *w.shape))
        torch.bmm(M.whole, w.transpose(1, 2), out=V.whole)
        size = (at.n, s.side, s.side, s.channels)
        x = at.array(f"x_g{s.index}", *size).zero_()
        if w_d is None:
            V.take(at, "planes_to_image", x)
            return Backward(weight, x, None)
        torch.baddbmm(V.parts[0], M.parts[1], w_d.transpose(1, 2), out=V.parts[0])
        x_d = at.array(f"x_g_d{s.index}", *size).zero_()
        V.take(at, "planes_to_image", x_d, x)
        return Backward(weight, x, x_d)

    def _planes(self, at: Chunk, name: str, parts: int, channels: int) -> "_Planes":
        """One row between planes, used by no one, keeps all from the same few lines of a cache."""
        rows = parts * at.n * (self.shape.side // self._m) ** 2
        whole = at.array(name, self._k, rows + 1, channels)[:, :rows]
        size = (at.n, self.shape.side, self.shape.side, channels, self._m)
        return _Planes(whole, whole.chunk(parts, 1), (rows + 1) * channels, size)


@dataclass(frozen=True)
class _Planes:
    """(k, rows, C), in one part or two."""

    whole: Tensor
    parts: tuple[Tensor, ...]
    stride: int
    size: tuple[int, ...]

    def take(self, at: Chunk, kernel: str, *spatial: Tensor | None) -> None:
        """Maps each part from or to an array of pixels."""
        for array, part in zip(spatial, self.parts, strict=False):
            if array is not None:
                at.call(kernel, array, part, self.stride, *self.size)


def convolution(shape: Shape) -> Patches | Tiles:
    """The cheaper way: images have few channels, so a network begins with patches."""
    return Patches(shape) if shape.index == 0 else Tiles(shape)
