"""YAML -> a validated, frozen ``SweepConfig``.

The sections ``dataset``, ``experts``, ``distill`` and ``evaluate`` are the dataclasses of
``ftd``; a value of ``experts`` or ``distill`` may be a search dimension (``ftd_ray.space``).
Everything is checked here, for every point of the space, before any work starts.
"""

import difflib
import os
import re
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ftd.data import DatasetConfig
from ftd.data.dataset import Description
from ftd.distill import DistillConfig
from ftd.errors import UserError
from ftd.evaluate import EvaluateConfig
from ftd.expert import ExpertConfig, identity, network_for
from ftd_ray.rules import check
from ftd_ray.sections import (
    OutputConfig,
    ResourcesConfig,
    SearchConfig,
    StoreConfig,
    TrackingConfig,
)
from ftd_ray.space import (
    Dimension,
    in_order,
    is_dimension,
    parse_dimension,
    points,
    with_parents,
)
from ftd_ray.storage import is_local

MAX_POINTS = 20_000
"""Combinations of dimensions that rules speak of together; more are refused."""

RULED_TOGETHER = (
    ("experts.sharpness", "experts.rho", "experts.sharpness_weight", "experts.gsam_alpha"),
    (
        "experts.epochs",
        "distill.expert_epochs",
        "distill.max_start_epoch",
        "distill.ipc",
        "distill.batch_syn",
        "distill.labels",
        "distill.lr_label",
    ),
    ("distill.optimiser", "distill.lr_img"),
    ("distill.optimiser", "distill.lr_lr"),
    ("distill.optimiser", "distill.labels", "distill.lr_label"),
    ("distill.ema_decay", "distill.ema_share"),
)
"""Keys that a rule reads together; every other key is ruled by its own values alone."""

DEFAULT_OF = {
    "experts.rho": "experts.sharpness",
    "distill.lr_img": "distill.optimiser",
    "distill.lr_lr": "distill.optimiser",
    "distill.lr_init": "distill.optimiser",
    "distill.ema_decay": "distill.ema_share",
}
"""Keys whose default is another one's matter: where that is searched, points differ in it."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


SECTIONS: dict[str, type] = {
    "dataset": DatasetConfig,
    "experts": ExpertConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "search": SearchConfig,
    "resources": ResourcesConfig,
    "store": StoreConfig,
    "tracking": TrackingConfig,
    "output": OutputConfig,
}
SEARCHED = ("experts", "distill")
TOP_LEVEL = ("name", "seed", *SECTIONS)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the space: what an expert set and a distillation need."""

    experts: ExpertConfig
    distill: DistillConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A whole sweep. ``experts`` and ``distill`` hold the first point; ``at`` gives any other."""

    name: str
    seed: int
    dataset: DatasetConfig
    experts: ExpertConfig
    distill: DistillConfig
    evaluate: EvaluateConfig
    search: SearchConfig
    resources: ResourcesConfig
    store: StoreConfig
    tracking: TrackingConfig
    output: OutputConfig
    space: tuple[Dimension, ...] = ()
    written: dict[str, Any] = field(default_factory=dict, repr=False)
    """The sections as they were written, search dimensions included."""

    @property
    def output_dir(self) -> str:
        assert self.output.dir is not None
        return self.output.dir

    @property
    def experiment(self) -> str:
        return self.tracking.experiment or self.name

    def at(self, params: dict[str, Any]) -> Point:
        """The point with ``params`` ({"experts.rho": 0.01, ...}) in the place of dimensions."""
        values: dict[str, dict[str, Any]] = {s: {} for s in SEARCHED}
        for key, value in params.items():
            section, _, name = key.partition(".")
            values[section][name] = value
        return Point(
            experts=_build("experts", self._literals("experts") | values["experts"]),
            distill=_build("distill", self._literals("distill") | values["distill"]),
        )

    def telling_points(self) -> typing.Iterator[dict[str, Any]]:
        """Points that break a rule if any point of the space does.

        Keys that are ruled together in every combination, with the other keys at their first
        value; then every value of each key by itself. Continuous dimensions by their two ends.
        """
        first = self.first_point()
        yield first
        for group in RULED_TOGETHER:
            dims = with_parents((d for d in self.space if d.key in group), self.space)
            for number, combination in enumerate(points(dims)):
                if number == MAX_POINTS:
                    keys = ", ".join(d.key for d in dims)
                    raise UserError(
                        f"the dimensions {keys} have over {MAX_POINTS} combinations, which are "
                        "checked one by one. Give them fewer values."
                    )
                yield self.completed(combination, dims)
        for d in self.space:
            dims = with_parents([d], self.space)
            for combination in points(dims):
                if d.key in combination:
                    yield self.completed(combination, dims)

    def first_point(self) -> dict[str, Any]:
        """Every dimension that exists there at its first value."""
        return self.completed({}, ())

    def completed(
        self, params: dict[str, Any], dims: typing.Collection[Dimension]
    ) -> dict[str, Any]:
        """``params``, which say all about ``dims``, with the other dimensions at first values."""
        done: dict[str, Any] = {}
        for d in self.space:
            if d.key in params:
                done[d.key] = params[d.key]
            elif d not in dims and d.active(done):
                done[d.key] = d.extremes()[0]
        return done

    def values_of(self, key: str) -> tuple[Any, ...]:
        """The values that a key of ``experts`` or ``distill`` takes in this sweep."""
        section, _, name = key.partition(".")
        default = next(f.default for f in fields(SECTIONS[section]) if f.name == name)
        for d in self.space:
            if d.key == key:
                return d.extremes() + ((default,) if d.when else ())
        return (getattr(getattr(self, section), name),)

    def expert_points(self) -> list[tuple[dict[str, Any], ExpertConfig]]:
        """The distinct combinations of the ``experts`` dimensions with their configurations."""
        found = []
        for params in points([d for d in self.space if d.key.startswith("experts.")]):
            experts = {k.partition(".")[2]: v for k, v in params.items()}
            found.append((params, _build("experts", self._literals("experts") | experts)))
        return found

    def identity(self, experts: ExpertConfig, data: Description) -> dict[str, Any]:
        """The identity of the expert set of ``experts`` in this sweep."""
        return identity(
            experts,
            data,
            self.dataset.strategy,
            self.resources.expert_numerics,
            self.store.precision,
        )

    def check_against(self, data: Description) -> None:
        """Raises UserError if some point of the space does not fit the data set."""
        for params in self.telling_points():
            point = self.at(params)
            network_for(point.experts.network, data)
            point.distill.check(epochs=point.experts.epochs, per_class=data.per_class)

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain values, defaults filled in, dimensions as written."""
        out: dict[str, Any] = {"name": self.name, "seed": self.seed}
        for section in SECTIONS:
            values = {
                k: list(v) if isinstance(v, tuple) else v
                for k, v in asdict(getattr(self, section)).items()
            }
            if section in SEARCHED:
                written = self.written[section]
                searched = {k: v for k, v in written.items() if is_dimension(v)}
                unsettled = (
                    key.partition(".")[2]
                    for key, other in DEFAULT_OF.items()
                    if key.startswith(f"{section}.") and self._searches(other)
                )
                values |= {k: None for k in unsettled if written.get(k) is None} | searched
            out[section] = values
        return out

    def _searches(self, key: str) -> bool:
        return any(d.key == key for d in self.space)

    def _literals(self, section: str) -> dict[str, Any]:
        return {k: v for k, v in self.written[section].items() if not is_dimension(v)}


def load_config(path: str | os.PathLike[str], overrides: typing.Sequence[str] = ()) -> SweepConfig:
    """Reads a sweep file and applies ``key.path=value`` overrides. Raises UserError."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}. Give the path of a sweep.") from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping with the sections {', '.join(TOP_LEVEL)}.")
    for override in overrides:
        apply_override(tree, override)
    try:
        return parse_config(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_config(tree: dict[str, Any]) -> SweepConfig:
    """Checks a parsed sweep and every point of its space. Raises UserError."""
    _check_keys(tree)
    name = tree.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"name={name!r} must be letters, digits, '.', '_' and '-' (it names a folder)."
        )
    seed = tree.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed={seed!r} must be a whole number of 0 or more.")
    written = {s: dict(tree.get(s) or {}) for s in SECTIONS}
    space = in_order(
        parse_dimension(f"{section}.{key}", written[section][key])
        for section in SEARCHED
        for key in (f.name for f in fields(SECTIONS[section]))  # not the file's order
        if is_dimension(written[section].get(key))
    )
    searched = {d.key for d in space}
    for d in space:
        if d.when:
            _check_condition(d)
        if d.key.startswith("experts.") and not d.discrete:
            raise UserError(
                f"{d.key}: dimensions of experts must be discrete, so that expert sets are "
                "shared. Add levels: n, or use choice or int."
            )
        if len(d.extremes()) == 1:
            raise UserError(f"{d.key}: a dimension of one value. Write {d.values[0]} itself.")
    if isinstance(many := written["search"].get("objectives"), list) and len(many) > 1:
        written["search"].setdefault("pruner", "none")
    first: dict[str, Any] = {}
    for d in space:
        if d.active(first):
            first[d.key] = d.extremes()[0]
    built = {}
    for section in SECTIONS:
        values = {k: v for k, v in written[section].items() if f"{section}.{k}" not in searched}
        values |= {k.partition(".")[2]: v for k, v in first.items() if k.startswith(f"{section}.")}
        built[section] = _build(section, values)
    config = SweepConfig(name=name, seed=seed, **built, space=space, written=written)
    config = _absolute(config)
    check(config)
    return config


def _check_condition(d: Dimension) -> None:
    section, _, name = d.key.partition(".")
    if next(f.default for f in fields(SECTIONS[section]) if f.name == name) is MISSING:
        raise UserError(f"{d.key}: has no default, so it cannot exist only when. Leave when out.")
    if section == "experts" and any(not key.startswith("experts.") for key, _ in d.when):
        raise UserError(
            f"{d.key}: when may name dimensions of experts only, so that expert sets are shared."
        )


def _build(section: str, values: dict[str, Any]) -> Any:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        checked = _model(section).model_validate(values)
    except ValidationError as error:
        first, *others = error.errors()
        path = ".".join([section, *(str(p) for p in first["loc"][:1])])
        path += "".join(f"[{p}]" for p in first["loc"][1:2] if isinstance(p, int))
        rules = [e["msg"] for e in (first, *others) if e["loc"][:1] == first["loc"][:1]]
        rule = " or ".join(re.sub(r"^Input should be ", "", r) for r in rules)
        must = "must be " if rule != rules[0] else ""
        raise UserError(f"{path}={first['input']!r} {must}{rule}.") from error
    try:
        return SECTIONS[section](**checked.model_dump(exclude_unset=True))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(section) else f"{section}.{text}") from error


@cache
def _model(section: str) -> type[BaseModel]:
    """Strict types of a section's dataclass: no string becomes a number, no 1 becomes true."""
    cls = SECTIONS[section]
    hints = typing.get_type_hints(cls)
    types: dict[str, Any] = {
        f.name: (hints[f.name], ... if f.default is MISSING else f.default) for f in fields(cls)
    }
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return create_model(cls.__name__, __config__=config, **types)


def _check_keys(tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        _check_key(str(key), TOP_LEVEL, "")
        if key not in SECTIONS:
            continue
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{key}={value!r} must be a mapping of keys to values.")
        names = [f.name for f in fields(SECTIONS[key])]
        for name, inner in (value or {}).items():
            _check_key(str(name), names, f"{key}.")
            if isinstance(inner, dict) and key not in SEARCHED and not _is_mapping(key, name):
                raise UserError(
                    f"{key}.{name} cannot be searched; only keys of experts and distill can. "
                    "Give one value."
                )
    for section, cls in SECTIONS.items():
        required = [f.name for f in fields(cls) if f.default is MISSING]
        missing = [r for r in required if r not in (tree.get(section) or {})]
        if missing:
            raise UserError(f"{section}.{missing[0]} is missing. Set it.")


def _is_mapping(section: str, name: str) -> bool:
    """Whether the value of a key is a mapping by its type."""
    hint = typing.get_type_hints(SECTIONS[section])[name]
    return any(typing.get_origin(t) is dict for t in typing.get_args(hint))


def _check_key(key: str, valid: typing.Sequence[str], prefix: str) -> None:
    if key in valid:
        return
    everywhere = list(valid)
    near = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.5)
    hint = f"Did you mean {prefix}{near[0]}?" if near else f"Known: {', '.join(everywhere)}."
    raise UserError(f"{prefix}{key} is not a known key. {hint}")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Puts the value of ``key.path=value`` into a parsed sweep. Raises UserError."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{override!r} is not an override. Write key.path=value.")
    value = _parse_yaml(text, f"the override {override!r}")
    node = tree
    *parents, last = path.split(".")
    for parent in parents:
        inner = node.setdefault(parent, {})
        if inner is None:
            inner = node[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"the override {override!r}: {parent} is not a section.")
        node = inner
    node[last] = value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 of PyYAML, but 1e-5 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} is not a plain word")
            if key in seen:
                raise yaml.YAMLError(f"the key {key} stands twice, line {node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML lets errors of its constructors through
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{place}: not valid YAML ({reason}).") from error


def _absolute(config: SweepConfig) -> SweepConfig:
    """Local paths become absolute: workers have other working directories."""

    def place(uri: str) -> str:
        if not is_local(uri):
            return uri
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))

    root, earlier = config.dataset.root, config.search.warm_start
    warm_start = None if earlier is None else place(earlier)
    return replace(
        config,
        search=replace(config.search, warm_start=warm_start),
        dataset=replace(config.dataset, root=None if root is None else place(root)),
        store=replace(config.store, uri=place(config.store.uri)),
        output=OutputConfig(dir=place(config.output.dir or f"runs/{config.name}")),
        tracking=replace(config.tracking, uri=_tracking_uri(config.tracking.uri)),
    )


def _tracking_uri(uri: str) -> str:
    prefix = "sqlite:///"
    if uri.startswith(prefix):
        return prefix + os.path.abspath(os.path.expanduser(uri.removeprefix(prefix)))
    if re.match(r"(https?|postgresql|mysql|mssql|sqlite)(\+\w+)?://", uri):
        return uri
    raise UserError(
        f"tracking.uri={uri!r} is not a place for MLflow. Give sqlite:///FILE, a database URI, or "
        "the http(s):// address of a tracking server."
    )
