"""One page about a sweep, for people: a file that needs no server, no network and no MLflow.

Everything is inside it, pictures as base64; its policy forbids a browser to load anything. All
that comes from outside (names, values, reasons) is escaped by the template, ``report.html.j2``.
"""

import re
import struct
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template

from ftd_ray.failures import patterns
from ftd_ray.pictures import short_names
from ftd_ray.pictures.drawing import best_of
from ftd_ray.pictures.front import words
from ftd_ray.pictures.places import ABSENT, value_text
from ftd_ray.progress import describe_params, duration
from ftd_ray.results import LOCAL_UI
from ftd_ray.search import Ended
from ftd_ray.space import Dimension
from ftd_ray.storage import is_local, join

LONGEST_REASON = 400
"""Characters of a reason: a page of a thousand failures must stay a page."""

SIGNS = {"complete": "●", "pruned": "○", "failed": "✕", "interrupted": "◌"}
"""Beside the word of a state and its colour, so that none stands alone."""

READING = {
    "history": "Each trial's last validation accuracy, in the order of the search.",
    "curves": "Validation accuracy of each trial's images while they were learned.",
    "slices": "Each hyperparameter on its own, all with the same scale of accuracy.",
    "joint": "How these act together. Hatched: not tried. Grey: tried, but none completed.",
    "parallel_coordinates": "A line is a trial; follow the bright ones from value to value.",
    "importance": "How much of the difference between trials each hyperparameter accounts for.",
    "front": "What accuracy costs: no trial is better than one on the front in everything.",
    "sets": "The best sets, with what they were made by.",
}
"""How to read a picture, by its name."""

CREDENTIALS = re.compile(r"(?<=://)([^/\s:@\"<>]+):[^/\s@\"<>]+@")
"""A page is passed on: passwords in addresses are no part of it."""


@dataclass(frozen=True)
class Column:
    title: str
    numeric: bool = True
    first: str = "ascending"
    """The order that a first click gives."""
    wide: bool = False


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | None = None
    """What a number is sorted by, where the text is rounded."""


@dataclass(frozen=True)
class Row:
    number: int
    state: str
    best: bool
    on_front: bool
    cells: tuple[Cell, ...]
    """Those after the number and the state."""


@dataclass(frozen=True)
class Bar:
    label: str
    text: str
    mean: float
    low: float
    high: float
    """Percent of the axis, as ``mean`` and ``low``."""
    kind: str


@dataclass(frozen=True)
class Picture:
    caption: str
    uri: str
    width: int
    height: int


def report_html(
    summary: Mapping[str, Any],
    ended: Sequence[Ended],
    space: Sequence[Dimension],
    configuration: str,
    pictures: Mapping[str, bytes],
    best_set: bytes | None,
) -> str:
    """The page. ``summary`` is that of ``summary.json``, ``configuration`` the resolved YAML,
    ``pictures`` PNG files by name, ``best_set`` the PNG of the best set."""
    config = _parsed(configuration)
    names = short_names(space)
    objectives = [o for o in summary.get("objectives") or () if o != "accuracy"]
    best = summary.get("best")
    front = summary.get("front") or []
    reached = list(dict.fromkeys(o for f in front for o in f["values"]))
    page = _template().render(
        name=summary["name"],
        state=summary["state"],
        signs=SIGNS,
        facts=_facts(summary),
        headline=_headline(summary, ended, names),
        failures=[
            f"{len(f.trials)} trials: {_clipped(str(f))}"
            for f in patterns(summary.get("failures", ()))
        ],
        bars=_bars(summary),
        finalists=_finalists(summary),
        front_objectives=[words(o) for o in reached],
        front=[
            (f["trial"], [_reached(o, f["values"].get(o)) for o in reached], _point(f, names))
            for f in front
        ],
        columns=_columns(space, names, objectives),
        rows=_rows(ended, space, objectives, best, front),
        states=_states(ended),
        best_set=_picture("best set", best_set) if best_set else None,
        pictures=[_picture(name, data) for name, data in pictures.items()],
        protocol=_protocol(summary, config),
        places=_places(summary, config),
        configuration=configuration,
    )
    return CREDENTIALS.sub(r"\1:***@", page)


@cache
def _template() -> Template:
    source = Path(__file__).with_name("report.html.j2").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


# --- what came out --------------------------------------------------------------------------


def _facts(summary: Mapping[str, Any]) -> list[str]:
    counts = dict(summary["trials"])
    if summary.get("interrupted"):
        counts["interrupted"] = summary["interrupted"]
    told = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    total = sum(counts.values())
    facts = [f"{total} {'trial' if total == 1 else 'trials'}{': ' if told else ''}{told}"]
    facts.append(f"took {duration(summary['seconds'])}")
    stopped = summary.get("stopped_by")
    if stopped == "trials":  # also said of a sweep that was interrupted or failed before its end
        facts += ["all trials ran"] if summary["state"] == "done" else []
    elif stopped:
        facts.append(f"stopped when the budget of {stopped} was used up")
    experts = summary.get("experts") or {}
    if experts:
        facts.append(f"{experts['built']} experts built, {experts['reused']} reused")
    return facts


def _headline(
    summary: Mapping[str, Any], ended: Sequence[Ended], names: dict[str, str]
) -> list[str]:
    """The result in sentences."""
    best = summary.get("best")
    if best is not None:
        lines = [f"Trial {best['trial']} is the best: {_point(best, names)}."]
        if test := best.get("test_accuracy"):
            real = (summary.get("baseline") or {}).get("random_real")
            beside = f", where random real images take it to {_score(real)}" if real else ""
            lines.append(
                f"Its images take a fresh network to {_score(test)} on test images "
                f"(mean ± standard deviation of {test['n']} networks){beside}."
            )
        return lines
    leader = best_of(ended)
    if summary["state"] == "interrupted":
        lines = ["The sweep was interrupted, and can go on where it was: the command is below."]
        if leader is not None:
            lines.append(
                f"Trial {leader.number} leads with {_percent(leader.value)} on validation images. "
                "Test images come last, and have not come yet."
            )
        return lines
    if leader is None:
        return ["No trial came to its end, so there is no set. The table says why each ended."]
    return [
        "The sweep stopped by an error before its end, and can go on: the command is below.",
        f"Trial {leader.number} leads with {_percent(leader.value)} on validation images.",
    ]


def _whole_data(baseline: Mapping[str, Any] | None) -> str:
    """The experts are what was trained on all data, for as long as experts are."""
    epochs = (baseline or {}).get("epochs")
    return f"test: experts, {epochs} epochs on all data" if epochs else "test: whole data set"


def _bars(summary: Mapping[str, Any]) -> list[Bar]:
    """Accuracies side by side, on one axis from 0."""
    best, baseline = summary.get("best"), summary.get("baseline") or {}
    if best is None:
        return []
    selected = {"mean": best["val_accuracy"], "std": 0.0}
    shown = [
        ("test: best set", best.get("test_accuracy"), "best"),
        ("test: random real images", baseline.get("random_real"), "baseline"),
        (_whole_data(baseline.get("whole_data")), baseline.get("whole_data"), "baseline"),
        ("validation: as selected on", selected, "validation"),
        ("validation: full protocol", best.get("val_accuracy_full"), "validation"),
    ]
    there = [(label, s, kind) for label, s, kind in shown if s]
    top = max(min(1.0, s["mean"] + s["std"]) for _, s, _ in there) or 1.0

    def share(x: float) -> float:
        return round(100 * max(0.0, min(x, top)) / top, 2)

    return [
        Bar(
            label=label,
            text=_score(s) + (f", n = {s['n']}" if "n" in s else ""),
            mean=share(s["mean"]),
            low=share(s["mean"] - s["std"]),
            high=share(s["mean"] + s["std"]),
            kind=kind,
        )
        for label, s, kind in there
    ]


def _finalists(summary: Mapping[str, Any]) -> list[tuple[int, str, str, bool]]:
    """Trial, validation as searched and by the full protocol, and whether it was chosen."""
    chosen = (summary.get("best") or {}).get("trial")
    return [
        (
            f["trial"],
            _percent(f["val_accuracy"]),
            f"{_score(f['val_accuracy_full'])}, n = {f['val_accuracy_full']['n']}",
            f["trial"] == chosen,
        )
        for f in summary.get("finalists") or ()
    ]


def _reached(objective: str, value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{100 * value:.1f}" if objective == "accuracy" else f"{value:.4g}"


def _point(trial: Mapping[str, Any], names: dict[str, str]) -> str:
    return describe_params(trial["params"], names).replace("  ", ", ")


# --- the table ------------------------------------------------------------------------------


def _columns(
    space: Sequence[Dimension], names: dict[str, str], objectives: Sequence[str]
) -> list[Column]:
    return [
        Column("trial"),
        Column("state", numeric=False),
        Column("val accuracy (%)", first="descending"),
        *(Column(names[d.key], numeric=d.ordered) for d in space),
        Column("seconds"),
        *(Column(words(o)) for o in objectives),
        Column("note", numeric=False, wide=True),
    ]


def _rows(
    ended: Sequence[Ended],
    space: Sequence[Dimension],
    objectives: Sequence[str],
    best: Mapping[str, Any] | None,
    front: Sequence[Mapping[str, Any]],
) -> list[Row]:
    on_front = {f["trial"] for f in front}
    rows = []
    for t in sorted(ended, key=lambda t: t.number):
        cells = [Cell(ABSENT) if t.value is None else _number(100 * t.value, 1)]
        cells += [_cell(t.params.get(d.key, ABSENT)) for d in space]
        cells.append(_number(t.seconds, 0) if t.seconds else Cell(ABSENT))
        for o in objectives:
            v = t.values.get(o)
            cells.append(Cell(ABSENT) if v is None else Cell(_reached(o, v), round(v, 6)))
        origin = f"from {t.start_from}" if t.start_from else ""
        cells.append(Cell(_clipped("; ".join(filter(None, (origin, t.reason))))))
        chosen = best is not None and t.number == best["trial"]
        rows.append(Row(t.number, t.state, chosen, t.number in on_front, tuple(cells)))
    return rows


def _cell(value: Any) -> Cell:
    number = isinstance(value, float) and value_text(value) != str(value)
    return Cell(value_text(value, 60), value if number else None)


def _number(value: float, digits: int) -> Cell:
    return Cell(f"{value:.{digits}f}", round(value, 6))


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"


def _states(ended: Sequence[Ended]) -> list[tuple[str, int]]:
    counts = dict.fromkeys(SIGNS, 0)
    for t in ended:
        counts[t.state] = counts.get(t.state, 0) + 1
    return [(state, n) for state, n in counts.items() if n]


# --- protocol and places --------------------------------------------------------------------


def _protocol(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the numbers mean, in words."""
    protocol = summary["protocol"]
    params = (summary.get("best") or {}).get("params", {})

    def setting(key: str) -> str | None:
        section, _, name = key.partition(".")
        value = (config.get(section) or {}).get(name)
        if isinstance(value, dict):
            chosen = f", {value_text(params[key])} in the best set" if key in params else ""
            return f"searched{chosen}"
        return None if value is None else value_text(value, 60)

    evaluate = config.get("evaluate") or {}
    selected = f"Trials were compared on {protocol['selected_on']}"
    if {"search_networks", "search_epochs"} <= evaluate.keys():
        n, epochs = evaluate["search_networks"], evaluate["search_epochs"]
        selected += f", by {_many(n, 'fresh network')} of {_many(epochs, 'epoch')} each"
    if finalists := summary.get("finalists"):
        had = "had their sets" if len(finalists) > 1 else "had its set"
        taken = ", and the best by that was taken" if len(finalists) > 1 else ""
        selected += (
            f". {_many(len(finalists), 'finalist')} of the search {had} evaluated by the full "
            f"protocol, on validation images too{taken}"
        )
    lines = [
        ("Selected on", f"{selected}."),
        ("Test", f"Test images: {protocol['test']}."),
        (
            "Full protocol",
            f"{_many(protocol['networks'], 'fresh network')}, trained for "
            f"{_many(protocol['epochs'], 'epoch')} each; a result is the mean ± standard deviation "
            "over them.",
        ),
    ]
    if network := setting("experts.network"):
        lines.append(("Network", f"{network}, of experts and of fresh networks."))
    if ipc := setting("distill.ipc"):
        lines.append(("Images per class", ipc))
    zca = (config.get("dataset") or {}).get("zca")
    if zca is not None:
        lines.append(("Whitening", "ZCA." if zca else "none: no ZCA, each channel standardised."))
    real = (summary.get("baseline") or {}).get("random_real")
    if real:
        at = f" at learning rate {value_text(real['lr'])}" if "lr" in real else ""
        lines.append(
            ("Random real images", f"As many real images per class, by the full protocol{at}.")
        )
    if "whole_data" in (summary.get("baseline") or {}):
        lines.append(("Whole data set", "The best trial's experts, trained on all training data."))
    if used := summary.get("budget"):
        limits = config.get("search") or {}
        lines.append(("Search took", _budget(used, limits)))
    return lines


def _budget(used: Mapping[str, float], limits: Mapping[str, Any]) -> str:
    """Hours and GPU hours of the search, and of how many it might have used."""
    parts = []
    for key, hours in used.items():
        limit = limits.get(f"max_{key}")
        of = f" of {limit:g}" if isinstance(limit, int | float) else ""
        parts.append(f"{hours:.2f}{of} {key.replace('_', ' ').replace('gpu', 'GPU')}")
    return f"{', '.join(parts)}."


def _places(summary: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Where things are: texts, and MLflow's address as a link to click."""
    output = (config.get("output") or {}).get("dir")
    mlflow = summary.get("mlflow") or {}
    uri, path = mlflow.get("tracking_uri", ""), mlflow.get("trials_path", "")
    served = uri.startswith(("http://", "https://"))
    server = CREDENTIALS.sub("", uri).rstrip("/")
    command = summary.get("command")
    if command is None and output and is_local(output):
        command = f"python -m ftd_ray.sweep {join(output, 'sweep.yaml')} --resume"
    return {
        "set": (summary.get("best") or {}).get("artifact"),
        "output": output,
        "store": (config.get("store") or {}).get("uri"),
        "tracking": uri,
        "served": served,
        "link": f"{server if served else LOCAL_UI}{path}" if path else None,
        "command": command,
    }


# --- small things ---------------------------------------------------------------------------


def _parsed(configuration: str) -> dict[str, Any]:
    """The configuration as a tree; of text that is none, nothing is said in words."""
    try:
        tree = yaml.safe_load(configuration)
    except yaml.YAMLError:
        return {}
    if not isinstance(tree, dict):
        return {}
    return {key: value for key, value in tree.items() if isinstance(value, dict)}


def _picture(name: str, png: bytes) -> Picture:
    width, height = struct.unpack(">II", png[16:24]) if len(png) >= 24 else (0, 0)
    caption = READING.get(name, name.replace("_", " "))
    return Picture(caption, f"data:image/png;base64,{b64encode(png).decode()}", width, height)


def _score(score: Mapping[str, float]) -> str:
    spread = f" ± {100 * score['std']:.1f}" if score.get("n") else ""
    return f"{100 * score['mean']:.1f}{spread} %"


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f} %"


def _many(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"
