"""The ConvNet as a function of one flat vector, against a plainly written nn.Module."""

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from ftd.errors import UserError
from ftd.networks import Network, build_network


class PlainConvNet(nn.Module):
    """Three blocks for 32 x 32, written out; instance norm as torch has it."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.norm1 = nn.InstanceNorm2d(width, affine=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(width, affine=True)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.norm3 = nn.InstanceNorm2d(width, affine=True)
        self.linear = nn.Linear(width * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in (
            (self.conv1, self.norm1),
            (self.conv2, self.norm2),
            (self.conv3, self.norm3),
        ):
            x = nn.functional.avg_pool2d(norm(conv(x)).clamp(min=0), 2, 2)
        return self.linear(x.reshape(len(x), -1))


def cifar_net(name: str = "ConvNetD3") -> Network:
    return build_network(name, channels=3, resolution=32, classes=10)


def test_the_fields_convnet_has_320010_parameters() -> None:
    assert cifar_net().size == 320_010


@pytest.mark.parametrize(
    ("depth", "resolution", "features"), [(3, 32, 2048), (4, 64, 2048), (5, 128, 2048)]
)
def test_each_depth_has_the_parameters_of_its_formula(
    depth: int, resolution: int, features: int
) -> None:
    network = build_network(f"ConvNetD{depth}", channels=3, resolution=resolution, classes=10)
    first, further = 3 * 9 * 128 + 128 + 256, 128 * 9 * 128 + 128 + 256
    assert network.size == first + (depth - 1) * further + features * 10 + 10


def test_convnet_equals_a_plain_module() -> None:
    network = cifar_net("ConvNetD3W16")
    plain = PlainConvNet(3, 16, 10)
    params_P = torch.randn(network.size, generator=torch.Generator().manual_seed(0)) / 4
    nn.utils.vector_to_parameters(params_P, plain.parameters())
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    logits = network(params_P, images)
    assert logits.shape == (5, 10)
    torch.testing.assert_close(logits, plain(images))
    cotangent = torch.randn(5, 10)
    w = params_P.clone().requires_grad_()
    (ours,) = torch.autograd.grad((network(w, images) * cotangent).sum(), w)
    (plain(images) * cotangent).sum().backward()
    theirs = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_image_does_not_see_the_others() -> None:
    network = cifar_net("ConvNetD3W8")
    w = network.init(torch.Generator().manual_seed(0))
    images = torch.randn(4, 3, 32, 32)
    alone = torch.cat([network(w, image[None]) for image in images])
    torch.testing.assert_close(network(w, images), alone)


def pieces(network: Network, width: int) -> list[Tensor]:
    """(weight, bias) of conv, norm, conv, norm, linear for depth 2 on 8 x 8 grey."""
    w = network.init(torch.Generator().manual_seed(0))
    sizes = [9 * width, width, width, width, 9 * width**2, width, width, width, 40 * width, 10]
    return list(w.split(sizes))


def test_default_init_has_torchs_bounds_and_spread() -> None:
    width = 64
    network = build_network(f"ConvNetD2W{width}", channels=1, resolution=8, classes=10)
    found = pieces(network, width)
    for weight, bias, fan_in in (
        (found[0], found[1], 9),
        (found[4], found[5], 9 * width),
        (found[8], found[9], 4 * width),
    ):
        bound = 1 / sqrt(fan_in)
        for values in (weight, bias):
            assert values.abs().max() <= bound
        assert weight.abs().max() > 0.95 * bound
        assert weight.mean().abs() < 0.1 * bound
        assert weight.std().item() == pytest.approx(bound / sqrt(3), rel=0.07)
        assert bias.unique().numel() > 1
    for weight, bias in ((found[2], found[3]), (found[6], found[7])):
        assert (weight == 1).all() and (bias == 0).all()


def test_default_init_has_the_distribution_of_torchs_own() -> None:
    """Quantiles of every layer beside those of a module that torch initialised."""
    network = cifar_net("ConvNetD3W32")
    torch.manual_seed(0)
    plain = PlainConvNet(3, 32, 10)
    w = network.init(torch.Generator().manual_seed(0))
    q = torch.linspace(0, 1, 11)
    for theirs, ours in zip(
        plain.parameters(), w.split([p.numel() for p in plain.parameters()]), strict=True
    ):
        if theirs.numel() > 500:
            scale = theirs.abs().max().item()
            difference = (ours.quantile(q) - theirs.detach().flatten().quantile(q)).abs().max()
            assert difference < 0.15 * scale


def test_init_draws_from_its_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    network = cifar_net("ConvNetD3W8")
    first = network.init(torch.Generator().manual_seed(3))
    network(first, torch.zeros(1, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(network.init(torch.Generator().manual_seed(3)), first)
    assert not torch.equal(network.init(torch.Generator().manual_seed(4)), first)


def test_width_defaults_to_128() -> None:
    assert cifar_net("ConvNetD3").size == cifar_net("ConvNetD3W128").size
    assert cifar_net("ConvNetD3W64").size < cifar_net("ConvNetD3").size


@pytest.mark.parametrize(("depth", "resolution", "fits"), [(3, 28, 24), (4, 8, 16), (2, 30, 28)])
def test_a_resolution_that_the_depth_does_not_divide_is_refused_with_a_remedy(
    depth: int, resolution: int, fits: int
) -> None:
    with pytest.raises(UserError) as caught:
        build_network(f"ConvNetD{depth}", channels=1, resolution=resolution, classes=10)
    message = str(caught.value)
    assert f"multiple of {2**depth}, not {resolution}" in message
    assert f"dataset.resolution={fits}" in message
    build_network(f"ConvNetD{depth}W2", channels=1, resolution=fits, classes=10)


@pytest.mark.parametrize("name", ["ConvNet", "ConvNetD0", "ConvNetD3W0", "convnetd3", "ConvNetD3X"])
def test_an_unknown_network_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"network='{name}' is not known"):
        build_network(name, channels=1, resolution=8, classes=10)
