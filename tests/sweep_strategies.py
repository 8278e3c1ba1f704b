"""Whole sweep files as Hypothesis draws them, and what may be done to one."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from ftd_ray.config import SEARCHED, SECTIONS

Path = tuple[str | int, ...]

WHOLE = st.integers(1, 9)
SHARE = st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.95])
RATE = st.sampled_from([1e-7, 3e-5, 0.001, 0.02, 0.1, 1, 2.5, 30, 1000.0])
RANGES = st.sampled_from([[1e-5, 0.1], [0.5, 2], [1, 1000]])

EXPERTS: dict[str, st.SearchStrategy[Any]] = {
    "network": st.sampled_from(["ConvNetD1W8", "ConvNetD2", "ConvNetD3W64"]),
    "count": WHOLE,
    "epochs": st.integers(8, 60),
    "lr": RATE,
    "batch_size": WHOLE,
    "momentum": SHARE,
    "weight_decay": SHARE,
    "seed": st.integers(0, 99),
}
DISTILL: dict[str, st.SearchStrategy[Any]] = {
    "ipc": WHOLE,
    "syn_steps": WHOLE,
    "expert_epochs": st.integers(1, 3),
    "max_start_epoch": st.integers(1, 6),
    "iterations": st.integers(40, 90),
    "lr_img": RATE,
    "lr_lr": st.one_of(st.just(0), RATE),
    "lr_init": RATE,
    "ema_decay": SHARE,
    "momentum": SHARE,
    "batch_syn": WHOLE,
    "init": st.sampled_from(["real", "noise"]),
    "gradient": st.sampled_from(["rematerialised", "direct"]),
}
WORDS = ("network", "init", "gradient")
EVERY = st.integers(1, 40)
EVALUATE = {
    "networks": WHOLE,
    "epochs": WHOLE,
    "search_networks": st.integers(1, 4),
    "search_epochs": WHOLE,
    "batch_size": WHOLE,
    "momentum": SHARE,
    "weight_decay": SHARE,
}
ELSEWHERE: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "dataset": st.one_of(
        st.fixed_dictionaries(
            {"name": st.just("digits")},
            optional={
                "val_fraction": st.sampled_from([0.1, 0.2]),
                "split_seed": WHOLE,
                "test_fraction": st.sampled_from([None, 0.3]),
                "zca": st.booleans(),
                "augment": st.sampled_from([None, "none", "color_crop"]),
            },
        ),
        st.fixed_dictionaries(
            {"name": st.just("cifar10"), "root": st.sampled_from(["/data", "data", "~/data"])},
            optional={"download": st.booleans(), "resolution": st.sampled_from([None, 16])},
        ),
    ),
    "evaluate": st.fixed_dictionaries({"every": EVERY}, optional=EVALUATE),
    "resources": st.fixed_dictionaries(
        {},
        optional={
            "cpus_per_expert": st.sampled_from([0.5, 1, 4]),
            "gpus_per_expert": st.sampled_from([0, 0.5, "auto"]),
            "cpus_per_trial": st.sampled_from([0.25, 2]),
            "gpus_per_trial": st.sampled_from([0, 0.125, 1]),
        },
    ),
    "store": st.fixed_dictionaries(
        {},
        optional={
            "uri": st.sampled_from(["./store", "/a b/ü", "s3://bucket/x?y=z", "file:///x"]),
            "precision": st.sampled_from(["float32", "float16", "bfloat16"]),
            "cache_mb": WHOLE,
        },
    ),
    "tracking": st.fixed_dictionaries(
        {},
        optional={
            "uri": st.sampled_from(["sqlite:///a.db", "http://h:5000", "postgresql://u@h/d"]),
            "experiment": st.sampled_from([None, "an experiment", "1", "ü"]),
        },
    ),
    "output": st.fixed_dictionaries(
        {}, optional={"dir": st.sampled_from([None, "out", "gs://bucket/y"])}
    ),
}


@st.composite
def dimensions(
    draw: st.DrawFn, key: str, one: st.SearchStrategy[Any], *, continuous: bool
) -> dict[str, Any]:
    """A dimension of values that ``one`` gives alone."""
    kinds = ["choice"]
    kinds += ["levels"] * (one is RATE) + ["float"] * (one is RATE and continuous)
    kinds += ["int"] * (key in ("ipc", "syn_steps", "batch_size", "count"))
    kind = draw(st.sampled_from(kinds))
    if kind == "choice":
        same = (lambda v: v) if key in WORDS else float
        return {"choice": draw(st.lists(one, min_size=2, max_size=3, unique_by=same))}
    if kind == "int":
        written: dict[str, Any] = {"int": [draw(st.integers(1, 3)), draw(st.integers(5, 9))]}
        return written | draw(st.sampled_from([{}, {"step": 2}]))
    written = {"float": draw(RANGES)} | draw(st.sampled_from([{}, {"log": True}, {"log": False}]))
    return written if kind == "float" else written | {"levels": draw(st.integers(2, 3))}


def values_of(written: dict[str, Any]) -> list[Any] | None:
    """Some values of a dimension as it is written; None for a continuous one."""
    if "choice" in written:
        return written["choice"]
    if "int" in written:
        return [written["int"][0]]
    return written["float"] if "levels" in written else None


@st.composite
def experts(draw: st.DrawFn) -> dict[str, Any]:
    """The section, with a sharpness that suits its parameters."""
    section = draw(st.fixed_dictionaries({}, optional=EXPERTS))
    radius = st.one_of(RATE, st.just({"choice": [0.0, 0.01, 0.1]}))
    kind = draw(st.sampled_from(["unsaid", "none", "sam", "gsam", "searched"]))
    if kind in ("sam", "gsam", "none"):
        section["sharpness"] = kind
    if kind in ("unsaid", "sam", "gsam") and draw(st.booleans()):
        section["rho"] = draw(radius)
    if kind == "sam" and draw(st.booleans()):
        section["sharpness_weight"] = draw(st.one_of(RATE, st.just({"choice": [0.3, 1.0]})))
    if kind == "gsam" and draw(st.booleans()):
        section["gsam_alpha"] = draw(SHARE)
    if kind == "searched":
        with_none = draw(st.booleans())
        section["sharpness"] = {"choice": ["none"] * with_none + ["sam", "gsam"]}
        section["gsam_alpha"] = {"choice": [0.1, 0.4], "when": {"sharpness": "gsam"}}
        section["rho"] = {
            "float": [0.01, 1],
            "levels": 2,
            "when": {"experts.sharpness": ["sam", "gsam"]},
        }
    return section


@st.composite
def distill(draw: st.DrawFn) -> dict[str, Any]:
    """The section, with a rate of labels where they are learned."""
    section = draw(st.fixed_dictionaries({}, optional=DISTILL))
    section.setdefault("iterations", 40)
    kind = draw(st.sampled_from(["unsaid", "hard", "soft", "searched"]))
    if kind in ("hard", "soft"):
        section["labels"] = kind
    if kind == "soft" and draw(st.booleans()):
        section["lr_label"] = draw(RATE)
    if kind == "searched":
        section["labels"] = {"choice": ["hard", "soft"]}
        section["lr_label"] = {"float": [0.1, 10], "log": True, "when": {"labels": ["soft"]}}
    return section


@st.composite
def sweeps(draw: st.DrawFn) -> dict[str, Any]:
    """A valid sweep file: dimensions of all kinds, and a search that can do with them."""
    tree: dict[str, Any] = {
        "name": draw(st.sampled_from(["a", "Sweep-1", "0.x_y"])),
        "experts": draw(experts()),
        "distill": draw(distill()),
    }
    tree |= {s: draw(v) for s, v in ELSEWHERE.items()}
    if draw(st.booleans()):
        tree["seed"] = draw(st.integers(0, 2**70))
    for section, known in (("experts", EXPERTS), ("distill", DISTILL)):
        for key in draw(st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True)):
            written = draw(dimensions(key, known[key], continuous=section == "distill"))
            parents = {
                f"{s}.{k}": v
                for s in (SEARCHED if section == "distill" else ["experts"])
                for k, v in tree[s].items()
                if isinstance(v, dict) and "when" not in v and values_of(v) is not None
            }
            if parents and draw(st.booleans()):
                parent = draw(st.sampled_from(sorted(parents)))
                if parent != f"{section}.{key}":
                    written["when"] = {parent: [draw(st.sampled_from(values_of(parents[parent])))]}
            if not any(f"{section}.{key}" in _conditions(tree, s) for s in SEARCHED):
                tree[section][key] = written
    tree["search"] = draw(search(tree))
    return draw(st.sampled_from([tree, {k: v for k, v in tree.items() if v}]))


def _conditions(tree: dict[str, Any], section: str) -> set[str]:
    """Whole keys that conditions of a section's dimensions name."""
    return {
        k if "." in k else f"{section}.{k}"
        for v in tree[section].values()
        if isinstance(v, dict)
        for k in v.get("when", {})
    }


@st.composite
def search(draw: st.DrawFn, tree: dict[str, Any]) -> dict[str, Any]:
    """A search that the rest of a sweep allows."""

    def maybe(**keys: st.SearchStrategy[Any]) -> dict[str, Any]:
        return draw(st.fixed_dictionaries({}, optional=keys))

    dims = {
        f"{s}.{k}": v for s in SEARCHED for k, v in tree[s].items() if isinstance(v, dict)
    }  # fmt: skip
    conditional = any("when" in d for d in dims.values())
    continuous = any(values_of(d) is None for d in dims.values())
    words = any(isinstance(v, str) for d in dims.values() for v in values_of(d) or ())
    gpu = bool(tree["resources"].get("gpus_per_trial"))

    others = ["cpu_seconds"] + ["gpu_seconds"] * gpu + ["ipc"] * ("distill.ipc" in dims)
    several = draw(st.booleans())
    objectives = ["accuracy"] + [draw(st.sampled_from(others))] * several
    samplers = ["tpe", "random"]
    samplers += ["gp"] * (not conditional) + ["nsga2"] * (not conditional and several)
    samplers += ["qmc"] * (not conditional and not words)
    samplers += ["cmaes"] * (not (conditional or words or several) and len(dims) > 1)
    samplers += ["grid"] * (not conditional and not continuous)
    sampler = draw(st.sampled_from(samplers))
    written: dict[str, Any] = {"trials": draw(st.integers(5, 60)), "sampler": sampler}
    written |= maybe(
        concurrency=WHOLE,
        finalists=st.integers(1, 5),
        max_hours=st.sampled_from([None, 0.5, 48]),
        repeats=st.integers(1, 4),
    )
    if several:
        written |= {"objectives": draw(st.permutations(objectives))}
        written |= maybe(pruner=st.just("none"))
    else:
        networks = tree["evaluate"].get("search_networks", 3)
        telling = networks * (written.get("repeats", 1) - 1) >= 4
        pruners = ["asha", "hyperband", "median", "none"] + ["wilcoxon"] * telling
        written["pruner"] = draw(st.sampled_from(pruners))
        if written["pruner"] in ("asha", "hyperband", "median"):
            written |= maybe(grace=st.integers(1, 39))
        if written["pruner"] in ("asha", "hyperband"):
            written |= maybe(reduction_factor=st.integers(2, 5))
    if sampler in ("tpe", "gp"):
        written |= maybe(startup_trials=WHOLE)
        if written.get("pruner") != "wilcoxon":
            written |= maybe(warm_start=st.sampled_from([None, "runs/earlier", "s3://b/e"]))
    if sampler == "nsga2":
        written["population"] = draw(st.integers(2, 4))
    if gpu or tree["resources"].get("gpus_per_expert"):
        written |= maybe(max_gpu_hours=st.sampled_from([0.25, 10]))
    if any(values_of(d) is None and "when" not in d for d in dims.values()):
        return written
    free = {k: values_of(d) for k, d in dims.items() if "when" not in d}
    if sampler != "grid" and draw(st.booleans()):
        point = {k: draw(st.sampled_from(v)) for k, v in free.items() if v}
        written["start_from"] = [point] if point else ["ftd-cifar10-ipc10"]
    if draw(st.booleans()) and all("choice" in d for d in dims.values()):
        many = 1
        for values in free.values():
            many *= len(values or ())
        if many >= 5:
            written |= {"duplicates": "skip", "trials": 5}
    return written


# --- odd changes ----------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
ODD = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 2, 1.5, 10**30, 10**400, -(10**400), 2**63, 1e300, -0.0]
    ),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e-320]),
    st.sampled_from(["", " ", "a\nb", "\u2028", "ü", "null", "1e-5", "sam", "gsam", "cmaes"]),
    st.sampled_from(["asha", "accuracy", "auto", "nsga2", "wilcoxon", "s3://[", "\x00", "ftd-x"]),
    TEXT,
    st.integers(-3, 60),
    st.floats(),
    st.dates(),
    st.binary(max_size=3),
    st.just({"a", "b"}),
)
KINDS = ["choice", "int", "float", "step", "log", "levels", "when", "sharpness", "distill.ipc", "x"]
ODD_VALUES = st.one_of(
    ODD,
    st.lists(ODD, max_size=3),
    st.dictionaries(
        st.one_of(st.sampled_from(KINDS), TEXT),
        st.one_of(ODD, st.lists(ODD, max_size=3)),
        max_size=3,
    ),
    st.just([["accuracy"]]),
    st.just({"choice": [0.01, 0.1], "when": {"sharpness": "sam"}}),
    st.just([{"experts.rho": "a\nb"}]),
)
ODD_KEYS = st.one_of(
    TEXT,
    st.sampled_from(["a\nb", "\r", "", "when", "int", "choice", "labels", "experts", "0"]),
    st.sampled_from(sorted(set(EXPERTS) | set(DISTILL) | set(EVALUATE) | {"trials", "sampler"})),
)


def paths(tree: Any, here: Path = ()) -> Iterator[Path]:
    """Where something stands in a tree."""
    inner = tree.items() if isinstance(tree, dict) else ()
    inner = enumerate(tree) if isinstance(tree, list) else inner
    for key, value in inner:
        yield (*here, key)
        yield from paths(value, (*here, key))


def _parent(tree: Any, path: Path) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _replaced(tree: dict[str, Any], path: Path, draw: Callable[..., Any]) -> list[Path]:
    _parent(tree, path)[path[-1]] = draw(ODD_VALUES)
    return [path]


def _dropped(tree: dict[str, Any], path: Path, draw: Callable[..., Any]) -> list[Path]:
    del _parent(tree, path)[path[-1]]
    return [path]


def _renamed(tree: dict[str, Any], path: Path, draw: Callable[..., Any]) -> list[Path]:
    node, key = _parent(tree, path), draw(ODD_KEYS)
    value = node.pop(path[-1])
    if isinstance(node, list):
        node.append({key: value})
        return [path]
    node[key] = value
    return [path, (*path[:-1], key)]


def _retyped(tree: dict[str, Any], path: Path, draw: Callable[..., Any]) -> list[Path]:
    node = _parent(tree, path)
    value = node[path[-1]]
    node[path[-1]] = draw(st.sampled_from([[value], str(value), {"choice": [value, value]}, None]))
    return [path]


def _added(tree: dict[str, Any], path: Path, draw: Callable[..., Any]) -> list[Path]:
    node, key = _parent(tree, path), draw(ODD_KEYS)
    if isinstance(node, list):
        node.append(draw(ODD_VALUES))
        return [path]
    node[key] = draw(ODD_VALUES)
    return [(*path[:-1], key)]


@st.composite
def mutated(draw: st.DrawFn, many: int) -> list[tuple[dict[str, Any], list[Path]]]:
    """A valid sweep, each time with one other change, and the places that it touched."""
    valid = draw(sweeps())
    places, found = list(paths(valid)), []
    for _ in range(many):
        tree, path = copy.deepcopy(valid), draw(st.sampled_from(places))
        change = draw(st.sampled_from([_replaced, _replaced, _dropped, _renamed, _retyped, _added]))
        found.append((tree, change(tree, path, draw)))
    return found


RULED = (
    "dataset.name dataset.root dataset.download",
    "experts.sharpness experts.rho experts.sharpness_weight experts.gsam_alpha",
    "experts.epochs distill.expert_epochs distill.max_start_epoch",
    "distill.labels distill.lr_label",
    "distill.optimiser distill.lr_img",
    "distill.optimiser distill.lr_lr",
    "distill.optimiser distill.lr_label",
    "distill.ema_decay distill.ema_share",
    "distill.iterations evaluate.every",
    "distill.iterations search.grace",
    "search.repeats search.grace",
    "search.pruner search.grace",
    "search.pruner search.reduction_factor",
    "search.pruner search.objectives",
    "search.pruner search.warm_start",
    "search.pruner search.repeats evaluate.search_networks",
    "search.sampler search.startup_trials",
    "search.sampler search.population",
    "search.sampler search.warm_start",
    "search.sampler search.start_from",
    "search.sampler search.objectives",
    "search.sampler search.population search.trials",
    "search.trials search.finalists",
    "search.trials search.start_from",
    "search.trials search.duplicates",
    "search.objectives distill.ipc",
    "search.objectives resources.gpus_per_trial",
    "search.max_gpu_hours resources.gpus_per_trial resources.gpus_per_expert",
)
"""Keys that a rule speaks of together."""

OF_THE_SPACE = ("search.sampler", "search.duplicates", "search.start_from")
"""Keys that rules read together with every dimension."""


def partners(touched: list[Path]) -> set[str]:
    """What a refusal may name after a change: its key, or one that a rule reads with it."""
    keys = set()
    for path in touched:
        section, *inner = map(str, path)
        known = [f"{section}.{inner[0]}"] if inner else [section]
        if not inner and section in SECTIONS:  # a whole section: any of its keys
            known += [f"{section}.{k}" for k in SECTIONS[section].__dataclass_fields__]
        if section in SEARCHED:
            known += OF_THE_SPACE
            if len(inner) > 1 and inner[1] == "when":
                known += [str(k) for k in inner[2:3]]
        for key in tuple(known):
            for rule in RULED:
                if key in rule.split() and key not in OF_THE_SPACE:
                    known += rule.split()
        if section == "search" and inner and f"search.{inner[0]}" in OF_THE_SPACE:
            known += [w for rule in RULED if f"search.{inner[0]}" in rule for w in rule.split()]
        keys |= set(known)
    return keys
