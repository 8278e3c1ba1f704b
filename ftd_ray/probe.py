"""Whether a device computes: a small matching step with a known answer, before its first use.

The step is two inner steps of a small network on four images, with its exact gradient: forward,
backward and second order, convolutions, norms and products. Everything it starts from is a formula,
so no generator is touched. On a CPU it costs 15 ms, half a second where torch was just imported
(of which the work would spend most), and on a GPU little beside the context that the work needs.
"""

import torch

from ftd.backends import gradients_for
from ftd.expert import Numerics
from ftd.matching import InnerStep, match_rematerialised
from ftd.networks import build_network
from ftd_ray.node_faults import NodeFault, fault_of

ANSWER = (1.0003315213, 0.0169938399, 0.0023052072, 0.0004437540)
"""Of ``matching_step``, in float64 on a CPU."""

TOLERANCE = 1e-2
"""Relative. float32 keeps six digits, and a device that is broken none."""

_checked: set[str] = set()


def check(numerics: Numerics) -> None:
    """Raises NodeFault when the device computes something else, or not at all.

    Once a process and device.
    """
    device = numerics.device
    if device in _checked:
        return
    try:
        found = matching_step(numerics.apply())
    except Exception as error:  # no other work has touched this process yet
        raise NodeFault("check", f"a small step fails there: {fault_of(error) or error}") from error
    right = zip(found, ANSWER, strict=True)
    if not all(abs(x - y) <= TOLERANCE * abs(y) for x, y in right):  # NaN is not
        raise NodeFault(
            "check", f"its {device} computes {_text(found)} where {_text(ANSWER)} is right"
        )
    _checked.add(device)


def matching_step(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[float, float, float, float]:
    """(loss, dL/deta, norm of dL/dx, one component of dL/dx) of the step."""
    network = build_network("ConvNetD2W8", channels=1, resolution=8, classes=3)
    weights = 0.5 * _wave(network.size, 0.7)
    start_P, target_P = weights, weights + 0.05 * _wave(network.size, 1.3)
    images = _wave(4 * 64, 0.37).reshape(4, 1, 8, 8)
    labels = torch.tensor([0, 1, 2, 0])
    match = match_rematerialised(
        gradients_for(network, "eager"),
        start_P.to(device, dtype),
        target_P.to(device, dtype),
        images.to(device, dtype),
        labels.to(device),
        torch.tensor(0.05, device=device, dtype=dtype),
        [InnerStep(None, None)] * 2,
    )
    grad = match.grad_images.double().cpu()
    numbers = (match.loss, match.grad_lr, grad.norm(), grad.flatten()[grad.abs().argmax()])
    loss, lr, norm, largest = (float(n) for n in numbers)
    return loss, lr, norm, largest


def _wave(n: int, frequency: float) -> torch.Tensor:
    return torch.sin(frequency * torch.arange(1, n + 1, dtype=torch.float64))


def _text(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{x:.4g}" for x in numbers)
