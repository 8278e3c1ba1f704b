"""The networks of the field, as pure functions of one flat parameter vector.

ConvNet (Gidaris & Komodakis, CVPR 2018, as used by DC, MTT and FTD): D blocks of
conv 3x3 -> instance norm (GroupNorm with a group a channel, affine) -> ReLU -> average pool 2,
then one linear layer.
"""

import re
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ftd.errors import UserError


class ConvNet(nn.Module):
    """The ConvNet of the field; images (N, C, H, H) -> logits (N, K)."""

    def __init__(self, *, channels: int, resolution: int, classes: int, depth: int, width: int):
        super().__init__()
        blocks: list[nn.Module] = []
        for i in range(depth):
            blocks += [
                nn.Conv2d(channels if i == 0 else width, width, 3, padding=1),
                nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (resolution >> depth) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class Network:
    """A module seen as a function of a flat parameter vector.

    ``network(params_P, images)`` gives logits (N, K); ``params_P`` has shape (P,). The module
    itself stays on the meta device: it holds structure, never numbers.
    """

    def __init__(
        self, name: str, module: nn.Module, *, channels: int, resolution: int, classes: int
    ):
        self.name = name
        self.channels, self.resolution, self.classes = channels, resolution, classes
        self._module = module
        self._names = [name for name, _ in module.named_parameters()]
        self._shapes = [p.shape for p in module.parameters()]
        self._sizes = [prod(s) for s in self._shapes]
        self.size = sum(self._sizes)

    def __call__(self, params_P: Tensor, images: Tensor) -> Tensor:
        named = dict(zip(self._names, self.pieces(params_P), strict=True))
        return functional_call(self._module, named, (images,))

    def pieces(self, params_P: Tensor) -> list[Tensor]:
        """``params_P`` as the module's parameters: views, in the module's order."""
        split = params_P.split(self._sizes)
        return [piece.view(shape) for piece, shape in zip(split, self._shapes, strict=True)]

    def init(self, generator: torch.Generator) -> Tensor:
        """Fresh parameters (P,): PyTorch's default initialisation, drawn from ``generator``.

        For convolutions and linear layers that is U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weight
        and bias alike (Kaiming uniform with a = sqrt(5)); norms start at weight 1 and bias 0.
        """
        pieces = []
        for layer in self._module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                bound = 1 / sqrt(layer.weight[0].numel())
                for p in layer.parameters(recurse=False):
                    u = torch.rand(p.shape, generator=generator)
                    pieces.append((2 * u - 1).mul_(bound).flatten())
            elif isinstance(layer, nn.GroupNorm):
                pieces += [torch.ones(layer.num_channels), torch.zeros(layer.num_channels)]
        params_P = torch.cat(pieces)
        assert params_P.numel() == self.size, "a layer type without an initialisation rule"
        return params_P


_NAME = re.compile(r"ConvNetD([1-9]\d?)(?:W([1-9]\d{0,4}))?")


@dataclass(frozen=True)
class ConvNetSpec:
    """What a name such as ``ConvNetD3`` or ``ConvNetD3W64`` says; width 128 when it says none."""

    depth: int
    width: int

    @classmethod
    def parse(cls, name: str) -> "ConvNetSpec":
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"network={name!r} is not known. Write ConvNetD<depth>, with W<width> behind it "
                "for another width than 128, as in ConvNetD3 or ConvNetD2W64."
            )
        return cls(depth=int(match[1]), width=int(match[2] or 128))


def build_network(name: str, *, channels: int, resolution: int, classes: int) -> Network:
    """The network ``name`` for images (channels, resolution, resolution) and ``classes`` classes.

    Raises UserError for an unknown name or a resolution that the depth does not divide.
    """
    spec = ConvNetSpec.parse(name)
    if resolution % 2**spec.depth:
        fits = max(resolution >> spec.depth, 1) << spec.depth
        raise UserError(
            f"network={name} halves the image {spec.depth} times, so the resolution must be a "
            f"multiple of {2**spec.depth}, not {resolution}. "
            f"Take another depth or dataset.resolution={fits}."
        )
    with torch.device("meta"):
        module = ConvNet(
            channels=channels,
            resolution=resolution,
            classes=classes,
            depth=spec.depth,
            width=spec.width,
        )
    return Network(name, module, channels=channels, resolution=resolution, classes=classes)
