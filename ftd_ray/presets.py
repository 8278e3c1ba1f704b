"""Published configurations by name, for ``search.start_from``.

FTD, Table 7 (CVPR 2023); for the ImageNet subsets what its author gave for them. The paper's alpha
is ``experts.sharpness_weight``; its synthetic batch is None where it is all images.
"""

import difflib
from typing import Any

from ftd.errors import UserError

_KEYS = (
    "distill.syn_steps",
    "distill.expert_epochs",
    "distill.max_start_epoch",
    "distill.batch_syn",
    "distill.lr_img",
    "distill.lr_lr",
    "distill.lr_init",
    "experts.sharpness_weight",
    "distill.ema_decay",
)

_TABLE_7: dict[tuple[str, int], tuple[Any, ...]] = {
    ("cifar10", 1): (50, 2, 2, None, 100.0, 1e-7, 0.01, 0.3, 0.9999),
    ("cifar10", 10): (30, 2, 20, None, 100.0, 1e-5, 0.001, 0.3, 0.9995),
    ("cifar10", 50): (30, 2, 40, None, 1000.0, 1e-5, 0.01, 1.0, 0.999),
    ("cifar100", 1): (40, 3, 20, None, 1000.0, 1e-5, 0.01, 1.0, 0.9995),
    ("cifar100", 10): (20, 2, 40, None, 1000.0, 1e-5, 0.01, 1.0, 0.9995),
    ("cifar100", 50): (80, 2, 40, 1000, 1000.0, 1e-5, 0.01, 1.0, 0.999),
    ("tiny_imagenet", 1): (30, 2, 10, None, 1e4, 1e-4, 0.01, 1.0, 0.999),
    ("tiny_imagenet", 10): (20, 2, 40, 500, 1e4, 1e-4, 0.01, 1.0, 0.999),
    ("imagenet", 1): (20, 2, 10, None, 1e4, 1e-4, 0.01, 1.0, 0.999),
    ("imagenet", 10): (20, 2, 10, 64, 1e4, 1e-4, 0.001, 1.0, 0.999),
}

PRESETS: dict[str, dict[str, Any]] = {
    f"ftd-{data}-ipc{ipc}": {
        "experts.rho": 0.01,
        "distill.ipc": ipc,
        **dict(zip(_KEYS, row, strict=True)),
    }
    for (data, ipc), row in _TABLE_7.items()
}
"""Name -> {key of the configuration: value}."""


def preset(name: str) -> dict[str, Any]:
    """The values of a preset. Raises UserError with the names that there are."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(PRESETS)}."
        raise UserError(f"search.start_from: there is no preset {name!r}. {hint}")
    return PRESETS[name]
