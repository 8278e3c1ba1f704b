"""Pixels in [0, 1] -> network space and back: per-channel statistics, or ZCA whitening.

ZCA (as in KIP and MTT): X_z = (X - mu) T with T = U (S + eps)^-1/2 U^T, U and S from the
covariance of the *training* images in [0, 1] (divided by N - 1), eps = 0.1. The same mu and T
serve test images; T's inverse takes synthetic images back to pixels.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ftd.errors import UserError

ZCA_EPS = 0.1
ZCA_MAX_VALUES = 3 * 64 * 64
"""Values an image may have under ZCA: the matrix has this number squared (12,288^2 = 600 MB)."""


@dataclass(frozen=True, eq=False)
class Normalisation:
    """An invertible affine map of images.

    ``kind`` standard: mean and scale have shape (C,), x -> (x - mean) / scale.
    ``kind`` zca: mean has shape (D,), scale (D, D) with D = C*H*W, x -> (x - mean) @ scale.
    """

    kind: str
    mean: Tensor
    scale: Tensor

    def apply(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], shape (N, C, H, W), to network space."""
        if self.kind == "standard":
            return (pixels - self.mean[:, None, None]) / self.scale[:, None, None]
        return ((pixels.flatten(1) - self.mean) @ self.scale).view_as(pixels)

    def invert(self, images: Tensor) -> Tensor:
        """Network space (N, C, H, W) back to pixels; values may leave [0, 1]."""
        if self.kind == "standard":
            return images * self.scale[:, None, None] + self.mean[:, None, None]
        return (images.flatten(1) @ self._inverse + self.mean).view_as(images)

    def to(self, device: torch.device) -> "Normalisation":
        return Normalisation(self.kind, self.mean.to(device), self.scale.to(device))

    @cached_property
    def _inverse(self) -> Tensor:
        return torch.linalg.inv(self.scale.double()).to(self.scale.dtype)


def fit_standard(images: np.ndarray, index: np.ndarray) -> Normalisation:
    """Per-channel mean and standard deviation of the uint8 images (N, C, H, W) at ``index``.

    Taken from histograms, so that the sums are exact and do not depend on their order.
    """
    channels = images.shape[1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(index), 1024):
        block = images[index[start : start + 1024]]
        for c in range(channels):
            counts[c] += np.bincount(block[:, c].ravel(), minlength=256)
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    if not std.all():
        raise UserError(
            f"dataset: channel {int(np.argmin(std))} has the same value in every training image, "
            "so it cannot be normalised. Check the images."
        )
    return Normalisation("standard", _float(mean), _float(std))


def check_zca(values: int) -> None:
    """Raises UserError when images of so many values are too large for ZCA."""
    if values > ZCA_MAX_VALUES:
        raise UserError(
            f"dataset.zca=true needs a {values} x {values} matrix for images of this size; the "
            f"limit is {ZCA_MAX_VALUES} values an image (64 x 64 RGB). "
            "Set dataset.zca=false or a lower dataset.resolution."
        )


def fit_zca(images: np.ndarray, index: np.ndarray) -> Normalisation:
    """ZCA whitening of the uint8 images (N, C, H, W) at ``index``; UserError if too large."""
    values = int(np.prod(images.shape[1:]))
    check_zca(values)
    total = np.zeros(values)
    for start in range(0, len(index), 2048):
        total += (images[index[start : start + 2048]].reshape(-1, values) / 255).sum(0)
    mean = total / len(index)
    covariance = torch.zeros(values, values, dtype=torch.float64)
    for start in range(0, len(index), 2048):
        block = images[index[start : start + 2048]].reshape(-1, values) / 255 - mean
        centred = torch.from_numpy(block)
        covariance.addmm_(centred.T, centred)
    s, u = torch.linalg.eigh(covariance / (len(index) - 1))
    matrix = (u * (s + ZCA_EPS).rsqrt()) @ u.T
    return Normalisation("zca", _float(mean), matrix.float())


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
