"""What half the bits on disk do to the matching loss and its gradient.

Real experts (digits, flat) and real images: the same outer steps with segments as they are and as
they come out of a store that keeps float16 or bfloat16.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import spread
from ftd.augment import FULL
from ftd.data import DatasetConfig, load
from ftd.distill import DistillConfig, draw_inner_steps, initial_state
from ftd.expert import ExpertConfig, network_for, train_expert
from ftd.gradients import Gradients
from ftd.matching import Match, match_rematerialised
from ftd.seeds import generator

EXPERTS = ExpertConfig(network="ConvNetD2W64", batch_size=128, lr=0.02, rho=0.01)
EPOCHS = 10
COUNT = 3
DISTILL = DistillConfig(ipc=1, syn_steps=20, expert_epochs=2, max_start_epoch=8, lr_init=0.02)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class _Kept:
    """Trajectories in memory."""

    def __init__(self, params: list[list[Tensor]]):
        self.experts, self._params = len(params), params

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return self._params[expert][start].numpy(), self._params[expert][end].numpy()


def run() -> dict[str, Any]:
    """Relative changes of loss and image gradient over every segment."""
    data = load(DatasetConfig(name="digits", val_fraction=0.15))
    gradients = Gradients(network_for(EXPERTS.network, data.description))
    whole = [
        [s.params_P for s in train_expert(EXPERTS, data, i, epochs=EPOCHS)] for i in range(COUNT)
    ]
    state = initial_state(DISTILL, data, _Kept(whole), gradients, epochs=EPOCHS, seed=0)

    def match(start: Tensor, target: Tensor, step: int) -> Match:
        gen = generator(0, "bench", step)
        steps = draw_inner_steps(DISTILL, len(state.images), FULL, gen, torch.device("cpu"))
        args = (start, target, state.images, state.labels, state.syn_lr, steps)
        return match_rematerialised(gradients, *args)

    found: dict[str, dict[str, list[float]]] = {
        name: {"loss": [], "cosine": [], "rounding": []} for name in DTYPES
    }
    for i, trajectory in enumerate(whole):
        for t in range(DISTILL.max_start_epoch):
            start, target = trajectory[t], trajectory[t + DISTILL.expert_epochs]
            step = i * DISTILL.max_start_epoch + t
            exact = match(start, target, step)
            for name, dtype in DTYPES.items():
                rounded = start.to(dtype).float(), target.to(dtype).float()
                other = match(*rounded, step)
                a, b = exact.grad_images.flatten(), other.grad_images.flatten()
                values = found[name]
                values["loss"].append(abs(float(other.loss / exact.loss) - 1))
                values["cosine"].append(float(torch.cosine_similarity(a, b, dim=0)))
                moved = (target - start).norm()
                values["rounding"].append(float((rounded[1] - target).norm() / moved))
    print({k: max(v["loss"]) for k, v in found.items()}, flush=True)
    return {"segments": COUNT * DISTILL.max_start_epoch, "found": found}


def render(results: dict[str, Any]) -> list[str]:
    lines = [
        f"{results['segments']} segments of {DISTILL.expert_epochs} epochs from flat experts on "
        "digits (ConvNet D2 of width 64,",
        f"rho 0.01, batches of {EXPERTS.batch_size}), N = {DISTILL.syn_steps}, the real images "
        "that a distillation starts from; each",
        "against the same step in float32. Rounding: the error of the target, as a share of the",
        "segment's length.",
        "",
        "| on disk | bytes | rounding | matching loss changes by | cosine of the image gradients |",
        "|---|---|---|---|---|",
    ]
    for name, values in results["found"].items():
        cells = [
            name,
            "x 0.5",
            spread([100 * v for v in values["rounding"]], "{:.2g} %"),
            spread([100 * v for v in values["loss"]], "{:.2g} %"),
            spread(values["cosine"], "{:.5f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
