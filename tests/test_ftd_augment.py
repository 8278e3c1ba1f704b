"""DSA against a naive version: one image, one pixel at a time."""

from math import cos, floor, pi, sin

import numpy as np
import pytest
import torch
from torch import Tensor

from ftd import augment
from ftd.augment import FAMILIES, FULL, ORIENTED, Draw
from ftd.errors import UserError

every_family = pytest.mark.parametrize("family", FAMILIES)
shapes = pytest.mark.parametrize("shape", [(6, 3, 8, 8), (5, 1, 12, 12), (4, 2, 7, 7)])


def sample(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Bilinear, with zeros outside."""
    _, h, w = image.shape
    value = np.zeros(len(image))
    for j in (floor(y), floor(y) + 1):
        for i in (floor(x), floor(x) + 1):
            if 0 <= j < h and 0 <= i < w:
                value += (1 - abs(y - j)) * (1 - abs(x - i)) * image[:, j, i]
    return value


def warp(image: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    """Corner pixels lie at -1 and 1; every output pixel looks up matrix @ its place."""
    _, h, w = image.shape
    out = np.zeros_like(image)
    for j in range(h):
        for i in range(w):
            v, u = 2 * j / (h - 1) - 1, 2 * i / (w - 1) - 1
            x = matrix[0][0] * u + matrix[0][1] * v
            y = matrix[1][0] * u + matrix[1][1] * v
            out[:, j, i] = sample(image, (y + 1) / 2 * (h - 1), (x + 1) / 2 * (w - 1))
    return out


def naive_color(image: np.ndarray, u: list[float]) -> np.ndarray:
    image = image + (u[0] - 0.5) * 1.0
    grey = image.mean(0, keepdims=True)
    image = (image - grey) * (u[1] * 2.0) + grey
    return (image - image.mean()) * (u[2] + 0.5) + image.mean()


def naive_crop(image: np.ndarray, u: list[float]) -> np.ndarray:
    _, h, w = image.shape
    down = floor(u[0] * (2 * round_half_up(h * 0.125) + 1)) - round_half_up(h * 0.125)
    right = floor(u[1] * (2 * round_half_up(w * 0.125) + 1)) - round_half_up(w * 0.125)
    out = np.zeros_like(image)
    for j in range(h):
        for i in range(w):
            if 0 <= j + down < h and 0 <= i + right < w:
                out[:, j, i] = image[:, j + down, i + right]
    return out


def naive_cutout(image: np.ndarray, u: list[float]) -> np.ndarray:
    _, h, w = image.shape
    tall, wide = round_half_up(h * 0.5), round_half_up(w * 0.5)
    top = floor(u[0] * (h + 1 - tall % 2)) - tall // 2
    left = floor(u[1] * (w + 1 - wide % 2)) - wide // 2
    out = image.copy()
    for j in range(top, top + tall):
        for i in range(left, left + wide):
            if 0 <= j < h and 0 <= i < w:
                out[:, j, i] = 0
    return out


def naive_flip(image: np.ndarray, u: list[float]) -> np.ndarray:
    return image[:, :, ::-1] if u[0] < 0.5 else image


def naive_scale(image: np.ndarray, u: list[float]) -> np.ndarray:
    sx, sy = (1 / 1.2 + v * (1.2 - 1 / 1.2) for v in u[:2])
    return warp(image, [[sx, 0], [0, sy]])


def naive_rotate(image: np.ndarray, u: list[float]) -> np.ndarray:
    angle = (2 * u[0] - 1) * 15 * pi / 180
    return warp(image, [[cos(angle), -sin(angle)], [sin(angle), cos(angle)]])


def round_half_up(value: float) -> int:
    return floor(value + 0.5)


NAIVE = {
    "color": naive_color,
    "crop": naive_crop,
    "cutout": naive_cutout,
    "flip": naive_flip,
    "scale": naive_scale,
    "rotate": naive_rotate,
}


def images_and_draw(family: str, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Draw]:
    gen = torch.Generator().manual_seed(seed)
    images = torch.randn(shape, generator=gen, dtype=torch.float64)
    return images, Draw(family, torch.rand(shape[0], 3, generator=gen))


@every_family
@shapes
def test_each_family_equals_its_naive_version(family: str, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        images, draw = images_and_draw(family, shape, seed)
        expected = np.stack(
            [NAIVE[family](x, u) for x, u in zip(images.numpy(), draw.values.tolist(), strict=True)]
        )
        out = augment.apply(draw, images)
        assert out.shape == images.shape and out.dtype == images.dtype
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["crop", "cutout"])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_range_stay_inside_the_image(family: str, u: float) -> None:
    images, _ = images_and_draw(family, (1, 2, 8, 8))
    out = augment.apply(Draw(family, torch.full((1, 3), u)), images)
    np.testing.assert_array_equal(out[0].numpy(), NAIVE[family](images[0].numpy(), [u] * 3))


def test_the_middle_of_the_range_changes_nothing() -> None:
    images, _ = images_and_draw("color", (3, 3, 8, 8))
    middle = torch.full((3, 3), 0.5)
    for family in ("color", "crop", "rotate"):
        out = augment.apply(Draw(family, middle), images)
        assert torch.allclose(out, images, atol=1e-6)


@every_family
def test_augmentation_is_differentiable_in_the_images(family: str) -> None:
    images, draw = images_and_draw(family, (2, 2, 6, 6))
    images.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment.apply(draw, x), (images,))


@every_family
def test_each_image_has_its_own_parameters(family: str) -> None:
    """The same picture many times over must not come out the same every time."""
    images, draw = images_and_draw(family, (16, 3, 8, 8))
    out = augment.apply(draw, images[:1].expand(16, -1, -1, -1))
    assert any(not torch.equal(out[0], other) for other in out[1:])


@every_family
def test_rows_of_a_draw_augment_their_part_of_the_batch(family: str) -> None:
    images, draw = images_and_draw(family, (7, 3, 8, 8))
    whole = augment.apply(draw, images)
    parts = [augment.apply(draw.rows(a, b), images[a:b]) for a, b in ((0, 3), (3, 4), (4, 7))]
    assert torch.equal(torch.cat(parts), whole)


@every_family
def test_applying_a_draw_again_gives_the_same_bits_and_keeps_the_images(family: str) -> None:
    images, draw = images_and_draw(family, (4, 3, 8, 8))
    before = images.clone()
    assert torch.equal(augment.apply(draw, images), augment.apply(draw, images))
    assert torch.equal(images, before)


def test_a_draw_names_one_family_and_every_family_comes_up_equally_often() -> None:
    gen = torch.Generator().manual_seed(0)
    families = [d.family for _ in range(1200) if (d := augment.draw(FULL, 2, gen))]
    assert len(families) == 1200
    for family in FAMILIES:
        assert 150 < families.count(family) < 250


def test_a_strategy_draws_only_its_own_families() -> None:
    gen = torch.Generator().manual_seed(0)
    drawn = {d.family for _ in range(200) if (d := augment.draw(ORIENTED, 1, gen))}
    assert drawn == set(FAMILIES) - {"flip"}


def test_values_are_uniform_and_one_row_an_image() -> None:
    draw = augment.draw("color", 4000, torch.Generator().manual_seed(0))
    assert draw is not None and draw.values.shape == (4000, 3)
    assert draw.values.min() >= 0 and draw.values.max() < 1
    assert torch.allclose(draw.values.mean(0), torch.tensor(0.5), atol=0.03)
    assert torch.allclose(draw.values.var(0), torch.tensor(1 / 12), atol=0.01)


def test_half_of_the_images_are_flipped() -> None:
    images, draw = images_and_draw("flip", (2000, 1, 4, 4))
    out = augment.apply(draw, images)
    kept = (out == images).flatten(1).all(1).double().mean().item()
    assert kept == pytest.approx(0.5, abs=0.04)


def test_a_draw_depends_on_its_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = augment.draw(FULL, 5, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = augment.draw(FULL, 5, torch.Generator().manual_seed(3))
    assert first is not None and second is not None
    assert first.family == second.family and torch.equal(first.values, second.values)


def test_none_draws_nothing_and_changes_nothing() -> None:
    gen = torch.Generator().manual_seed(0)
    before = gen.get_state()
    images = torch.randn(2, 1, 4, 4)
    draw = augment.draw("none", 2, gen)
    assert draw is None
    assert torch.equal(gen.get_state(), before)
    assert augment.apply(draw, images) is images


@pytest.mark.parametrize(
    ("strategy", "named"), [("color_blur", "blur"), ("flip_flip", "flip_flip"), ("", "''")]
)
def test_an_unknown_or_repeated_family_is_refused_by_name(strategy: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        augment.parse_strategy(strategy)
