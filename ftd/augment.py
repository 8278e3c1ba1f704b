"""Differentiable siamese augmentation (DSA; Zhao & Bilen, ICML 2021): draw, then apply.

``draw`` holds the randomness: ONE family of transformations a batch, its parameters per image.
``apply`` holds the gradient: it is a pure, differentiable function of the images, so a
recomputed step replays the same draw and both passes of a sharpness-aware step share one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from ftd.errors import UserError

FAMILIES = ("color", "crop", "cutout", "flip", "scale", "rotate")
FULL = "color_crop_cutout_flip_scale_rotate"
ORIENTED = "color_crop_cutout_scale_rotate"
"""Without flip: for images whose orientation carries meaning, such as digits."""

SCALE_RATIO = 1.2
ROTATE_DEGREES = 15.0
CROP_PAD = 0.125
CUTOUT_SIDE = 0.5
FLIP_P = 0.5
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5


@dataclass(frozen=True)
class Draw:
    """One family and its parameters: ``values`` are uniform in [0, 1), shape (N, parameters)."""

    family: str
    values: Tensor

    def rows(self, start: int, stop: int) -> "Draw":
        """The part of the draw that belongs to images start..stop of the batch."""
        return Draw(self.family, self.values[start:stop])

    def to(self, device: torch.device) -> "Draw":
        return Draw(self.family, self.values.to(device))


def parse_strategy(strategy: str) -> tuple[str, ...]:
    """The families that a strategy such as ``color_crop_flip`` names; ``none`` names no family."""
    if strategy == "none":
        return ()
    families = tuple(strategy.split("_"))
    for family in families:
        if family not in FAMILIES:
            raise UserError(
                f"augment={strategy!r} names {family!r}, which is not a DSA family. Join some of "
                f"{', '.join(FAMILIES)} with '_', or write none."
            )
    if len(set(families)) != len(families):
        raise UserError(f"augment={strategy!r} names a family twice. Name each once.")
    return families


def draw(strategy: str, n: int, generator: torch.Generator) -> Draw | None:
    """Draws one family of ``strategy`` and its parameters for ``n`` images; None for ``none``."""
    families = parse_strategy(strategy)
    if not families:
        return None
    which = int(torch.randint(len(families), (), generator=generator))
    return Draw(families[which], torch.rand(n, 3, generator=generator))


def apply(draw: Draw | None, images: Tensor) -> Tensor:
    """Augments images (N, C, H, W) by a draw for N images; differentiable in the images."""
    return images if draw is None else _APPLY[draw.family](images, draw.values)


def _color(x: Tensor, u: Tensor) -> Tensor:
    u = u.to(x.dtype)[:, :, None, None, None]
    x = x + (u[:, 0] - 0.5) * BRIGHTNESS
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * (u[:, 1] * SATURATION) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (u[:, 2] + CONTRAST) + mean


def _crop(x: Tensor, u: Tensor) -> Tensor:
    """Shifts by up to CROP_PAD of the side each way, zeros moving in."""
    n, _, h, w = x.shape
    pad_h, pad_w = int(h * CROP_PAD + 0.5), int(w * CROP_PAD + 0.5)
    top = (u[:, 0] * (2 * pad_h + 1)).long()
    left = (u[:, 1] * (2 * pad_w + 1)).long()
    padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
    rows = top[:, None] + torch.arange(h, device=x.device)
    cols = left[:, None] + torch.arange(w, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    # Advanced indices around the channel slice put the channels last.
    return padded[image, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """Zeroes a square of CUTOUT_SIDE of the side whose centre is anywhere in the image."""
    h, w = x.shape[2:]

    def hidden(u: Tensor, side: int) -> Tensor:
        size = int(side * CUTOUT_SIDE + 0.5)
        centre = (u * (side + 1 - size % 2)).long()
        start = (centre - size // 2)[:, None]
        position = torch.arange(side, device=x.device)
        return (position >= start) & (position < start + size)

    mask = hidden(u[:, 0], h)[:, None, :, None] & hidden(u[:, 1], w)[:, None, None, :]
    return x * ~mask


def _flip(x: Tensor, u: Tensor) -> Tensor:
    return torch.where(u[:, 0, None, None, None] < FLIP_P, x.flip(3), x)


def _affine(x: Tensor, matrix: Tensor) -> Tensor:
    grid = F.affine_grid(matrix.to(x.dtype), list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


def _scale(x: Tensor, u: Tensor) -> Tensor:
    s = 1 / SCALE_RATIO + u[:, :2] * (SCALE_RATIO - 1 / SCALE_RATIO)
    matrix = torch.zeros(len(u), 2, 3, device=u.device)
    matrix[:, 0, 0], matrix[:, 1, 1] = s[:, 0], s[:, 1]
    return _affine(x, matrix)


def _rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = (u[:, 0] - 0.5) * 2 * (ROTATE_DEGREES * pi / 180)
    matrix = torch.zeros(len(u), 2, 3, device=u.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 0, 1], matrix[:, 1, 0] = -angle.sin(), angle.sin()
    return _affine(x, matrix)


_APPLY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
