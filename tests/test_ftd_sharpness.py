"""SAM, ASAM, GSAM and FTD's weight against naive versions of their formulas."""

from math import sqrt

import pytest
import torch
from torch import Tensor

from ftd.sharpness import (
    SHARPNESS,
    asam_ascent,
    gsam_combine,
    sam_ascent,
    sharp_grad,
    weighted,
)

RHO = 0.3
perturbing = pytest.mark.parametrize("sharpness", [s for s in SHARPNESS if s != "none"])


def loss_and_gradient(w: Tensor) -> tuple[Tensor, Tensor]:
    """A bent function of four weights and its gradient by hand."""
    a, b, c, d = w
    loss = a**2 * b + torch.sin(c) * d + 0.5 * b**2 + a * d**3
    grad = [2 * a * b + d**3, a**2 + b, torch.cos(c) * d, torch.sin(c) + 3 * a * d**2]
    return loss, torch.stack(grad)


W = torch.tensor([0.7, -1.3, 0.4, 0.9], dtype=torch.float64)


def naive(sharpness: str, rho: float, alpha: float = 1.0, a: float = 0.0) -> list[float]:
    """field.md's formulas, number by number."""
    w = W.tolist()
    g = loss_and_gradient(W)[1].tolist()
    if sharpness in ("sam", "gsam"):
        norm = sqrt(sum(x * x for x in g)) + 1e-12
        e = [rho * x / norm for x in g]
    else:
        norm = sqrt(sum((abs(u) * x) ** 2 for u, x in zip(w, g, strict=True))) + 1e-12
        e = [rho * u * u * x / norm for u, x in zip(w, g, strict=True)]
    moved = torch.tensor([u + x for u, x in zip(w, e, strict=True)], dtype=torch.float64)
    g_p = loss_and_gradient(moved)[1].tolist()
    if sharpness.startswith("gsam"):
        dot = sum(x * y for x, y in zip(g, g_p, strict=True))
        square = sum(y * y for y in g_p)
        return [y - a * (x - dot / square * y) for x, y in zip(g, g_p, strict=True)]
    return [x + alpha * (y - x) for x, y in zip(g, g_p, strict=True)]


@pytest.mark.parametrize("sharpness", ["sam", "asam"])
@pytest.mark.parametrize("alpha", [1.0, 0.3, 2.0])
def test_sam_and_asam_equal_their_formulas(sharpness: str, alpha: float) -> None:
    _, g = sharp_grad(loss_and_gradient, W, sharpness=sharpness, rho=RHO, sharpness_weight=alpha)
    assert g.tolist() == pytest.approx(naive(sharpness, RHO, alpha=alpha), rel=1e-12)


@pytest.mark.parametrize("sharpness", ["gsam", "gsam_adaptive"])
@pytest.mark.parametrize("a", [0.0, 0.3, 1.5])
def test_gsam_equals_its_formula_in_both_balls(sharpness: str, a: float) -> None:
    _, g = sharp_grad(loss_and_gradient, W, sharpness=sharpness, rho=RHO, gsam_alpha=a)
    assert g.tolist() == pytest.approx(naive(sharpness, RHO, a=a), rel=1e-9)


def test_the_measures_differ_from_each_other() -> None:
    results = [
        sharp_grad(loss_and_gradient, W, sharpness=s, rho=RHO, gsam_alpha=0.5)[1] for s in SHARPNESS
    ]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert not torch.allclose(first, second)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_zero_radius_is_the_plain_gradient(sharpness: str) -> None:
    loss, g = sharp_grad(loss_and_gradient, W, sharpness=sharpness, rho=0.0)
    assert torch.equal(g, loss_and_gradient(W)[1])
    assert torch.equal(loss, loss_and_gradient(W)[0])


@perturbing
def test_a_small_radius_approaches_the_plain_gradient(sharpness: str) -> None:
    _, plain = loss_and_gradient(W)
    _, g = sharp_grad(loss_and_gradient, W, sharpness=sharpness, rho=1e-9)
    assert torch.allclose(g, plain, rtol=1e-7)
    assert not torch.equal(g, plain)


@perturbing
def test_the_loss_returned_is_the_one_before_the_ascent(sharpness: str) -> None:
    loss, _ = sharp_grad(loss_and_gradient, W, sharpness=sharpness, rho=RHO)
    assert torch.equal(loss, loss_and_gradient(W)[0])


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_the_gradient_function_is_called_as_often_as_needed(sharpness: str) -> None:
    seen: list[Tensor] = []

    def counting(w: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(w)
        return loss_and_gradient(w)

    sharp_grad(counting, W, sharpness=sharpness, rho=0.0 if sharpness == "none" else RHO)
    assert len(seen) == (1 if sharpness == "none" else 2)
    assert torch.equal(seen[0], W)


def test_sam_ascends_to_the_sphere_along_the_gradient() -> None:
    g = loss_and_gradient(W)[1]
    e = sam_ascent(W, g, RHO)
    assert e.norm().item() == pytest.approx(RHO)
    assert torch.allclose(e / e.norm(), g / g.norm())


def test_asam_ascends_to_the_sphere_scaled_by_the_weights() -> None:
    e = asam_ascent(W, loss_and_gradient(W)[1], RHO)
    assert (e / W.abs()).norm().item() == pytest.approx(RHO)


def test_asam_is_blind_to_a_rescaling_that_leaves_the_function_alone() -> None:
    """w -> A w with L unchanged has gradient g / A; the ascent must scale along, e -> A e."""
    g, scale = loss_and_gradient(W)[1], torch.tensor([2.0, 0.5, 10.0, 0.1], dtype=torch.float64)
    assert torch.allclose(asam_ascent(scale * W, g / scale, RHO), scale * asam_ascent(W, g, RHO))
    assert not torch.allclose(sam_ascent(scale * W, g / scale, RHO), scale * sam_ascent(W, g, RHO))


@pytest.mark.parametrize("ascent", [sam_ascent, asam_ascent])
def test_ascent_at_a_flat_point_stays_there(ascent: object) -> None:
    assert callable(ascent)
    assert torch.equal(ascent(W, torch.zeros_like(W), RHO), torch.zeros_like(W))


def test_what_gsam_takes_away_is_at_right_angles_to_the_perturbed_gradient() -> None:
    g, g_p = torch.randn(2, 30, dtype=torch.float64).unbind()
    removed = g_p - gsam_combine(g, g_p, 1.0)
    assert (removed @ g_p).item() == pytest.approx(0, abs=1e-9)
    assert removed.norm() > 0.1


def test_sharpness_weight_one_is_sam_itself_and_zero_is_plain() -> None:
    g, g_p = torch.randn(2, 30).unbind()
    assert torch.equal(weighted(g, g_p, 1.0), g_p)
    assert torch.equal(weighted(g, g_p, 0.0), g)
    assert torch.allclose(weighted(g, g_p, 0.5), (g + g_p) / 2)
