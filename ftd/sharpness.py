"""Sharpness-aware gradients as wrappers of a gradient function.

w = params_P, g = grad L(w), e = ascent step, g_p = grad L(w + e).

- SAM (Foret et al., ICLR 2021):   e = rho g / ||g||
- ASAM (Kwon et al., ICML 2021):   e = rho w^2 g / || |w| g ||
- GSAM (Zhuang et al., ICLR 2022): g_perp = g - (g.g_p / ||g_p||^2) g_p;  g_p - a g_perp
- FTD's objective, L + alpha (L(w + e) - L(w)):  g + alpha (g_p - g);  alpha = 1 is SAM

FTD's paper writes the L2 ball and alpha; its published code runs the adaptive ball and passes
alpha as GSAM's a. Here each has its own name: ``sharpness_weight`` is alpha, ``gsam_alpha`` is a.
"""

from collections.abc import Callable

from torch import Tensor

GradFn = Callable[[Tensor], tuple[Tensor, Tensor]]
"""params (P,) -> (loss (), gradient (P,))."""

EPS = 1e-12

SHARPNESS = ("none", "sam", "asam", "gsam", "gsam_adaptive")
"""``gsam`` ascends in the L2 ball, ``gsam_adaptive`` in ASAM's."""


def sam_ascent(params_P: Tensor, grad_P: Tensor, rho: float) -> Tensor:
    """e = rho g / (||g|| + 1e-12)."""
    return grad_P * (rho / (grad_P.norm() + EPS))


def asam_ascent(params_P: Tensor, grad_P: Tensor, rho: float) -> Tensor:
    """e = rho w^2 g / (|| |w| g || + 1e-12)."""
    scaled = params_P.abs() * grad_P
    return params_P.abs() * scaled * (rho / (scaled.norm() + EPS))


def weighted(grad_P: Tensor, perturbed_P: Tensor, alpha: float) -> Tensor:
    """g + alpha (g_p - g): the gradient of FTD's objective; alpha = 1 gives g_p itself."""
    return perturbed_P if alpha == 1 else grad_P + alpha * (perturbed_P - grad_P)


def gsam_combine(grad_P: Tensor, perturbed_P: Tensor, a: float) -> Tensor:
    """g_p - a g_perp, where g_perp is the part of g at right angles to g_p."""
    along = (grad_P @ perturbed_P) / (perturbed_P @ perturbed_P + EPS)
    return perturbed_P - a * (grad_P - along * perturbed_P)


def sharp_grad(
    grad_fn: GradFn,
    params_P: Tensor,
    *,
    sharpness: str,
    rho: float,
    sharpness_weight: float = 1.0,
    gsam_alpha: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss at w, gradient to descend by) under the sharpness measure ``sharpness``.

    ``grad_fn`` is called once for ``none`` and twice otherwise; it must replay the same batch
    and the same augmentation both times.
    """
    loss, g = grad_fn(params_P)
    if sharpness == "none" or rho == 0:
        return loss, g
    ascent = asam_ascent if sharpness in ("asam", "gsam_adaptive") else sam_ascent
    _, g_p = grad_fn(params_P + ascent(params_P, g, rho))
    if sharpness in ("gsam", "gsam_adaptive"):
        return loss, gsam_combine(g, g_p, gsam_alpha)
    return loss, weighted(g, g_p, sharpness_weight)
