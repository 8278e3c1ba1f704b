"""Images of CIFAR's shape that need no download: a faint pattern a class, under noise."""

import torch

from ftd import augment
from ftd.data import Dataset, Split
from ftd.data.dataset import Description
from ftd.data.normalise import Normalisation
from ftd.seeds import generator

CLASSES = 10


def noise(train: int, test: int, device: torch.device) -> Dataset:
    """``train`` and ``test`` images, the classes in turn; 10 more are the validation split."""
    gen = generator(0, "bench", "noise", train, test)
    n = train + CLASSES + test
    labels = torch.arange(n) % CLASSES
    patterns = torch.rand(CLASSES, 3, 32, 32, generator=gen)
    mixed = 0.1 * patterns[labels] + 0.9 * torch.rand(n, 3, 32, 32, generator=gen)
    images = (255 * mixed).to(torch.uint8).to(device)
    half = torch.full((3,), 0.5)
    normalisation = Normalisation("standard", half, half / 2).to(device)

    def part(start: int, stop: int) -> Split:
        index = torch.arange(start, stop, device=device)
        return Split(images, labels.to(device), index, normalisation)

    def count(start: int, stop: int) -> tuple[int, ...]:
        return tuple(torch.bincount(labels[start:stop], minlength=CLASSES).tolist())

    return Dataset(
        Description(
            name="noise",
            class_names=tuple(str(k) for k in range(CLASSES)),
            channels=3,
            resolution=32,
            counts=(count(0, train), count(train, train + CLASSES), count(train + CLASSES, n)),
            fingerprint="noise",
        ),
        augment.FULL,
        normalisation,
        train=part(0, train),
        val=part(train, train + CLASSES),
        test=part(train + CLASSES, n),
    )


def as_tensors(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split in network space, and their labels, on the CPU."""
    everything = torch.arange(len(split), device=split.labels.device)
    return split.batch(everything).cpu(), split.labels.cpu()
