"""A choice as a sweep file, with the reason beside each value."""

import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import yaml

from ftd.data import DatasetConfig
from ftd_ray.new.choice import FILLED, Choice
from ftd_ray.new.forecast import EVALUATED
from ftd_ray.new.images import Images
from ftd_ray.progress import duration

WIDTH = 100
"""Columns of the file."""

OVERRUN = 1.3
"""How much longer than its hours a sweep may take, before its search is ended."""

Line = tuple[str, Any, str]
"""Key, value and comment."""


def page(choice: Choice, images: Images, name: str, command: str, hours: float) -> str:
    """The file's text; ``command`` is what wrote it."""
    sections = {
        "dataset": _dataset(images, choice.scale.resolution),
        "experts": _experts(choice, images),
        "distill": _distill(choice),
        "evaluate": _evaluate(choice),
        "search": _search(choice, hours),
        "resources": _resources(choice),
    }
    f = choice.forecast
    readable = command.encode(errors="backslashreplace").decode()  # names of any bytes
    head = (
        f"Written by `{readable}` for {sum(images.train)} training images in {images.classes} "
        f"classes: about {duration(f.total)} on {choice.crew.workers} workers."
    )
    return "\n".join(
        [
            *textwrap.wrap(head, WIDTH, initial_indent="# ", subsequent_indent="# "),
            "#",
            "# docs/configuration.md describes every key. Any value can be given on the command",
            "# line behind the file, as in distill.ipc=10; the time changes with it.",
            "",
            f"name: {_word(name)}",
            "seed: 0",
            *(line for title, lines in sections.items() for line in _section(title, lines)),
            "",
        ]
    )


def _dataset(images: Images, resolution: int) -> list[Line]:
    """What is set otherwise than by default, and the resolution."""
    d = images.dataset
    parts = f"{sum(images.train)} train, {sum(images.val)} validation, {sum(images.test)} test"
    comments = {
        "name": parts,
        "val_fraction": "held out of train, class by class: what trials are selected on",
        "on_unreadable": f"{len(images.found.unreadable)} files cannot be read",
    }
    lines: list[Line] = [
        (f.name, getattr(d, f.name), comments.get(f.name, ""))
        for f in fields(DatasetConfig)
        if f.name == "name" or (f.name != "resolution" and getattr(d, f.name) != f.default)
    ]
    middle = f"the middle image has {images.side} pixels on its shorter side"
    return [*lines, ("resolution", resolution, middle)]


def _experts(choice: Choice, images: Images) -> list[Line]:
    p = choice.programme
    steps = -(-sum(images.train) // p.batch_size)
    final = p.scale.resolution >> p.scale.depth
    return [
        (
            "network",
            p.scale.network,
            f"{p.scale.resolution} -> {final} pixels in {p.scale.depth} blocks",
        ),
        ("count", p.experts, "trajectories of each set"),
        ("epochs", p.epochs, f"{p.epochs * steps} SGD steps, {steps} an epoch"),
        (
            "batch_size",
            p.batch_size,
            "so that an epoch has enough steps",
        ),
        ("lr", p.lr, ""),
        ("sharpness", "sam", ""),
        ("rho", {"choice": list(p.rho)}, "0 is plain SGD (MTT); an expert set for each"),
    ]


def _distill(choice: Choice) -> list[Line]:
    p = choice.programme
    window: Any = p.windows[0] if len(p.windows) == 1 else {"choice": list(p.windows)}
    return [
        ("ipc", p.scale.ipc, "synthetic images per class"),
        ("syn_steps", {"choice": list(p.syn_steps)}, "N: student steps, which must reach ..."),
        ("expert_epochs", {"choice": list(p.expert_epochs)}, "... as far as M epochs of an expert"),
        ("max_start_epoch", window, f"segments start below it and end by epoch {p.epochs}"),
        ("iterations", p.iterations, "outer steps"),
        ("optimiser", "rmsprop", "its learning rates suit any images"),
        (
            "lr_img",
            {"choice": list(p.lr_img)},
            "of a class in a step, in standard deviations",
        ),
        ("ema_share", 0.1, "what is kept averages a tenth of the steps"),
    ]


def _evaluate(choice: Choice) -> list[Line]:
    p = choice.programme
    return [
        ("every", p.every, f"{p.iterations // p.every} reports of a trial, to prune it by"),
        ("search_networks", p.search_networks, "fresh networks of each"),
        ("search_epochs", p.search_epochs, ""),
        (
            "networks",
            p.networks,
            f"of the final evaluation: {duration(choice.forecast.final)} for {EVALUATED} sets",
        ),
        ("epochs", p.network_epochs, ""),
    ]


def _search(choice: Choice, hours: float) -> list[Line]:
    p, f = choice.programme, choice.forecast
    limit = OVERRUN * hours - (f.start + f.final) / 3600
    return [
        ("trials", p.trials, f"what fits {FILLED:.0%} of {duration(3600 * hours)}"),
        ("concurrency", p.concurrency, "as many as workers"),
        ("sampler", "tpe", ""),
        ("startup_trials", p.startup_trials, "at random, before it learns"),
        ("pruner", "asha", "a third of the trials goes on at each rung"),
        ("finalists", p.finalists, "compared by the full protocol at the end"),
        ("max_hours", float(f"{limit:.2g}"), "only if the forecast was far too low"),
    ]


def _resources(choice: Choice) -> list[Line]:
    crew, memory = choice.crew, f"{choice.memory / 1e9:g}GB"
    lines: list[Line] = []
    for kind in ("expert", "trial"):
        lines.append((f"cpus_per_{kind}", crew.cpus, ""))
        if crew.gpus:
            lines.append((f"gpus_per_{kind}", round(crew.gpus, 4), ""))
        took = f"{choice.pace.memory / 1e9:.1f} GB were measured" if kind == "expert" else ""
        lines.append((f"memory_per_{kind}", memory, took))
    return lines


def _section(title: str, lines: Sequence[Line]) -> list[str]:
    """A section's lines, with the comments in one column."""
    written = [f"  {key}: {_value(value)}" for key, value, _ in lines]
    column = max(len(w) for w, (_, _, comment) in zip(written, lines, strict=True) if comment) + 2
    return ["", f"{title}:"] + [
        f"{w:{column}}# {comment}" if comment else w
        for w, (_, _, comment) in zip(written, lines, strict=True)
    ]


def _word(text: str) -> str:
    """A text in quotes where YAML would take it for something else, as 2024 or yes."""
    written = _value(text)
    return written if written == text and text[0].isalpha() else f"'{text}'"


def _value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()
