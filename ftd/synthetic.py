"""The result: a synthetic set with everything that its accuracy depends on, in one file.

The file is a plain ``.npz`` (numpy arrays and one JSON text, no pickle): images in network
space, labels, eta, the normalisation with its ZCA matrix if there is one, the evaluation
protocol, and where the set came from.
"""

import io
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ftd.data import Normalisation
from ftd.errors import UserError
from ftd.evaluate import Protocol

FORMAT = "ftd-synthetic-set"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class SyntheticSet:
    """A distilled set: train a fresh network on it by ``protocol`` at learning rate ``syn_lr``."""

    images: Tensor
    """(N, C, H, W) float32 in network space: what a network is fed, without further scaling."""
    labels: Tensor
    """(N,) int64 class indices, or (N, K) float32 probabilities."""
    syn_lr: float
    """The learned learning rate eta."""
    normalisation: Normalisation
    """How real images get into the same space."""
    class_names: tuple[str, ...]
    protocol: Protocol
    provenance: dict[str, Any] = field(default_factory=dict)
    """Data set, configuration and scores, as JSON values."""

    @property
    def hard_labels(self) -> Tensor:
        """(N,) the class of each image; of soft labels the most likely one."""
        return self.labels.argmax(1) if self.labels.is_floating_point() else self.labels

    def pixels(self) -> Tensor:
        """The images as uint8 pixels (N, C, H, W)."""
        return (self.normalisation.invert(self.images).clamp(0, 1) * 255).round().to(torch.uint8)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file at once or not at all; equal sets give equal bytes."""
        temporary = Path(f"{os.fspath(path)}.part")
        temporary.write_bytes(self.to_bytes())
        os.replace(temporary, path)

    def to_bytes(self) -> bytes:
        """The content of the file."""
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "syn_lr": self.syn_lr,
            "normalisation": self.normalisation.kind,
            "class_names": list(self.class_names),
            "protocol": self.protocol.to_json(),
            "provenance": self.provenance,
        }
        buffer = io.BytesIO()
        np.savez(
            buffer,
            header=np.array(json.dumps(header, sort_keys=True)),
            images=self.images.cpu().numpy(),
            labels=self.labels.cpu().numpy(),
            normalisation_mean=self.normalisation.mean.cpu().numpy(),
            normalisation_scale=self.normalisation.scale.cpu().numpy(),
        )
        return buffer.getvalue()

    @classmethod
    def load(cls, source: str | os.PathLike[str] | BinaryIO) -> "SyntheticSet":
        """Reads what ``save`` wrote. Raises UserError for anything else."""
        try:
            with np.load(source, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                arrays = {k: torch.from_numpy(file[k]) for k in file.files if k != "header"}
            if header["format"] != FORMAT or header["version"] != FORMAT_VERSION:
                raise UserError(
                    f"{source} is {header['format']!r} version {header['version']}; this program "
                    f"reads {FORMAT!r} version {FORMAT_VERSION}. Use the version that wrote it."
                )
            return cls(
                images=arrays["images"],
                labels=arrays["labels"],
                syn_lr=header["syn_lr"],
                normalisation=Normalisation(
                    header["normalisation"],
                    arrays["normalisation_mean"],
                    arrays["normalisation_scale"],
                ),
                class_names=tuple(header["class_names"]),
                protocol=Protocol(**header["protocol"]),
                provenance=header["provenance"],
            )
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{source} is not a synthetic set ({error}).") from error

    def grid(self, *, cell: int = 96, per_class: int = 10) -> Image.Image:
        """A picture of the set in pixel space: a column a class, a row an image of it."""
        return grid(self.pixels(), self.hard_labels, len(self.class_names), cell, per_class)

    def png(self, *, cell: int = 96, per_class: int = 10) -> bytes:
        """The grid as the bytes of a PNG file."""
        buffer = io.BytesIO()
        self.grid(cell=cell, per_class=per_class).save(buffer, "PNG")
        return buffer.getvalue()

    def export_folder(self, folder: str | os.PathLike[str]) -> int:
        """Writes ``CLASS/number.png`` in pixel space, for any image tool; returns how many.

        PNG rounds and clips: train from the ``.npz`` for the accuracy that was measured.
        """
        names = [name.replace("/", "_") for name in self.class_names]
        if len(set(names)) < len(names):  # a/b and a_b
            names = [f"{k:03d}_{name}" for k, name in enumerate(names)]
        counts: dict[int, int] = {}
        for pixels, k in zip(self.pixels(), self.hard_labels.tolist(), strict=True):
            number = counts[k] = counts.get(k, -1) + 1
            path = Path(folder) / names[k]
            path.mkdir(parents=True, exist_ok=True)
            _image(pixels).save(path / f"{number:04d}.png")
        return sum(counts.values()) + len(counts)


def grid(
    pixels: Tensor, labels: Tensor, classes: int, cell: int = 96, per_class: int = 10
) -> Image.Image:
    """Pictures (N, C, H, W) uint8 as a grid: a column a class, at most 20 in a row."""
    margin = max(2, cell // 24)
    columns = min(classes, 20)
    members = [torch.nonzero(labels == k).flatten()[:per_class] for k in range(classes)]
    rows = max((len(m) for m in members), default=1) or 1
    bands = -(-classes // columns)
    step = cell + margin
    sheet = Image.new("RGB", (columns * step + margin, bands * rows * step + margin), "white")
    for k, which in enumerate(members):
        for r, i in enumerate(which.tolist()):
            side = max(1, cell // pixels.shape[-1]) * pixels.shape[-1]
            picture = _image(pixels[i]).resize((min(side, cell),) * 2, Image.Resampling.NEAREST)
            if side < cell or side > cell:
                picture = picture.resize((cell, cell), Image.Resampling.BILINEAR)
            x = margin + (k % columns) * step
            y = margin + ((k // columns) * rows + r) * step
            sheet.paste(picture, (x, y))
    return sheet


def _image(pixels: Tensor) -> Image.Image:
    array = pixels.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
