"""A trial: (configuration, store) -> reports. Thin over ``ftd.distill`` and ``ftd.evaluate``.

Nothing here knows Ray: ``ftd_ray.workers`` runs these functions in actors.
"""

import io
import json
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import nan
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ftd import __version__
from ftd.backends import gradients_for
from ftd.data import Dataset, DatasetConfig, Sender, load
from ftd.distill import (
    DistillConfig,
    DistillState,
    StepRecord,
    Trajectories,
    distill,
    initial_state,
)
from ftd.errors import UserError
from ftd.evaluate import (
    EvaluateConfig,
    Protocol,
    Score,
    evaluate,
    random_real,
    train_fresh,
)
from ftd.expert import Numerics, accuracy, network_for
from ftd.gradients import Gradients
from ftd.memory import room_for_final, room_for_trial, side_by_side
from ftd.seeds import derive_seed
from ftd.synthetic import SyntheticSet
from ftd.trajectory import DamagedError, ExpertSet
from ftd_ray.node_faults import needs_the_data
from ftd_ray.storage import (
    PlaceError,
    files_below,
    is_local,
    join,
    place_error,
    read_bytes,
    remove_file,
    remove_tree,
    write_bytes,
)
from ftd_ray.store import TrajectoryStore

PREVIEW_PER_CLASS = 10
"""Images of each class in the picture of a report."""


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """All that one trial depends on."""

    number: int
    seed: int
    """Of the sweep."""
    repeat: int
    """Counts earlier trials at the same point, which distilled from other seeds."""
    repeats: int = 1
    """Distillations of the trial, one after the other."""
    dataset: DatasetConfig
    sender: Sender | None = None
    """Where the data set comes from on nodes that have not got it."""
    network: str
    identity: dict[str, Any]
    """Of the expert set."""
    experts: int
    """How many experts of the set to use."""
    distill: DistillConfig
    evaluate: EvaluateConfig
    numerics: Numerics
    store_uri: str
    cache_bytes: int
    """Of the node's cache of segments."""
    folder: str
    """Where the trial keeps its checkpoint and its result."""

    def distill_seed(self, repeat: int) -> int:
        """The seed of one of its distillations: the same in all trials that are no repetitions."""
        return derive_seed(self.seed, "distill", self.repeat * self.repeats + repeat)

    @property
    def last_epoch(self) -> int:
        """Of the experts, that segments reach."""
        return self.distill.max_start_epoch - 1 + self.distill.expert_epochs

    @property
    def checkpoint(self) -> str:
        return join(self.folder, "checkpoint", "state.npz")

    @property
    def result(self) -> str:
        return join(self.folder, "synthetic.npz")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial tells at every evaluation."""

    step: int
    """Outer steps so far, over all repeats."""
    val_accuracy: float
    """On validation images: mean over ``evaluate.search_networks`` fresh networks, and over the
    finished repeats and this one."""
    val_std: float
    """Over the fresh networks of this evaluation."""
    networks: dict[int, float]
    """At the end of a distillation the accuracy of each fresh network, numbered over all repeats:
    networks of one number have the same seed in every trial."""
    curve: tuple[StepRecord, ...]
    """Outer steps since the report before."""
    seconds: float
    """Since the report before, evaluation included."""
    evaluating: float = field(default=0.0, compare=False)
    """Seconds of them that the evaluation took."""
    picture: bytes
    """PNG of the set in pixel space."""
    first_picture: bytes = b""
    """PNG of the set before the first step, in the first report of a trial."""
    done: bool


def read_directly(spec: TrialSpec) -> Trajectories:
    """The first experts of a trial's set, from the store itself."""
    return FirstExperts(TrajectoryStore(spec.store_uri).expert_set(spec.identity), spec.experts)


def run_trial(
    spec: TrialSpec, trajectories: Callable[[TrialSpec], Trajectories] = read_directly
) -> Iterator[Report]:
    """Distils, yielding a report every ``evaluate.every`` steps; goes on from its checkpoint.

    It does so ``spec.repeats`` times from different seeds, one after the other. ``trajectories``
    says where segments are read from. The last report has ``done`` set, and the synthetic set of
    the best repeat lies at ``spec.result`` by then.
    Raises ftd.errors.Diverged.
    """
    began = time.monotonic()
    device = spec.numerics.apply()
    data = _data(spec, device)
    kept = load_checkpoint(spec, device)
    experts, finals, before = Reading(trajectories, spec), kept.finals, kept.state
    for repeat in range(len(finals), spec.repeats):
        before = before or _start(spec, data, experts, repeat)
        first = not (repeat or before.step)
        first_picture = _png(synthetic_set(spec, data, before)) if first else b""
        for state, records, score, evaluating in _distilled(spec, data, experts, repeat, before):
            ended = state.step == spec.distill.iterations
            result = synthetic_set(spec, data, state, repeat)
            if ended and score.mean > max(finals, default=-1.0):
                _write(spec, spec.result, result.to_bytes())
            done = ended and repeat == spec.repeats - 1
            offset, now = repeat * spec.distill.iterations, time.monotonic()
            yield Report(
                step=offset + state.step,
                val_accuracy=fmean([*finals, score.mean]),
                val_std=score.std,
                networks={
                    repeat * len(score.accuracies) + i: a for i, a in enumerate(score.accuracies)
                }
                if ended
                else {},
                curve=tuple(replace(r, step=offset + r.step) for r in records),
                seconds=now - began,
                evaluating=evaluating,
                picture=_png(result),
                first_picture=first_picture,
                done=done,
            )
            first_picture = b""
            if not done:  # whoever asks for more has the report on record
                finals = (*finals, score.mean) if ended else finals
                save_checkpoint(spec, Checkpoint(finals, None if ended else state))
            began = now
        before = None


def _data(spec: "TrialSpec | FinalSpec | WholeDataSpec", device: torch.device) -> Dataset:
    """The data set, which lies on every node, or is sent there."""
    with needs_the_data():
        return load(spec.dataset, device, spec.sender)


def _write(spec: TrialSpec, uri: str, data: bytes) -> None:
    """Writes a file of the trial's folder. Raises PlaceError."""
    try:
        write_bytes(uri, data)
    except (OSError, pa.ArrowException) as error:
        raise place_error(spec.folder, "the trial's folder", error, verb="written") from error


def _start(spec: TrialSpec, data: Dataset, experts: Trajectories, repeat: int) -> DistillState:
    """Where a distillation begins: real images, or what ``distill.init`` says."""
    gradients = _trial_gradients(spec, data)
    seed = spec.distill_seed(repeat)
    return initial_state(spec.distill, data, experts, gradients, epochs=spec.last_epoch, seed=seed)


def _trial_gradients(spec: TrialSpec, data: Dataset, *, beside: int = 1) -> Gradients:
    """For a distillation, of which so many networks may be evaluated beside each other."""
    network = network_for(spec.network, data.description)
    room = room_for_trial(network, spec.distill, data)
    room = None if room is None else room // beside
    return gradients_for(network, spec.numerics.backend, room=room)


def _final_gradients(name: str, images: int, data: Dataset, numerics: Numerics) -> Gradients:
    """For an evaluation of a set of so many images."""
    network = network_for(name, data.description)
    return gradients_for(network, numerics.backend, room=room_for_final(network, images, data))


def _png(synthetic: SyntheticSet) -> bytes:
    return synthetic.png(cell=64, per_class=PREVIEW_PER_CLASS)


def _distilled(
    spec: TrialSpec,
    data: Dataset,
    experts: Trajectories,
    repeat: int,
    before: DistillState,
) -> Iterator[tuple[DistillState, list[StepRecord], Score, float]]:
    """The state at every evaluation, the steps up to it, its score and the seconds that took."""
    config, settings = spec.distill, spec.evaluate
    beside = side_by_side(settings.search_networks, spec.numerics)
    gradients = _trial_gradients(spec, data, beside=beside)
    short = Protocol.of(
        settings, network=spec.network, augment=data.strategy, epochs=settings.search_epochs
    )
    records: list[StepRecord] = []
    for state, record in distill(
        config,
        data,
        experts,
        spec.network,
        epochs=spec.last_epoch,
        seed=spec.distill_seed(repeat),
        state=before,
        backend=spec.numerics.backend,
    ):
        records.append(record)
        if record.step < config.iterations and record.step % settings.every:
            continue
        began = time.monotonic()
        score = evaluate(
            gradients,
            state.ema_images,
            state.label_targets,
            record.syn_lr,
            short,
            data.val,
            networks=range(settings.search_networks),
            seed=derive_seed(spec.seed, "search"),
        )
        yield state, records, score, time.monotonic() - began
        records = []


def forget_checkpoint(folder: str) -> None:
    """Removes the checkpoint below a trial's folder, once its end is on record."""
    if is_local(folder):
        remove_tree(join(folder, "checkpoint"))
    else:  # three requests in place of seven
        remove_file(join(folder, "checkpoint", "state.npz"))


def forget_checkpoints(folder: str, ended: Container[int]) -> None:
    """Removes what the ``ended`` of the trials below a folder left, when nobody else has."""
    for path in files_below(folder):
        number, _, name = path.partition("/")
        if name == "checkpoint/state.npz" and number.isdigit() and int(number) in ended:
            forget_checkpoint(join(folder, number))


class Reading:
    """The experts of a trial. Where one cannot be read, the broker shall look: it is damaged for
    all, or not to be seen from this node."""

    def __init__(self, trajectories: Callable[[TrialSpec], Trajectories], spec: TrialSpec):
        self._open, self._uri = partial(trajectories, spec), spec.store_uri
        self._experts: Trajectories | None = None
        self.experts = spec.experts

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            self._experts = self._experts or self._open()
            return self._experts.segment(expert, start, end)
        except (OSError, pa.ArrowException) as error:
            if not is_local(self._uri):
                raise place_error(self._uri, "store.uri", error, verb="read") from error
            raise DamagedError(f"expert {expert} cannot be read ({error}).") from error
        except UserError as error:
            if isinstance(error, DamagedError | PlaceError):
                raise
            raise DamagedError(str(error)) from error


class FirstExperts:
    """The first ``experts`` experts of a set, whatever else the store holds of it."""

    def __init__(self, experts: ExpertSet, count: int):
        self._set, self.experts = experts, count

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return self._set.segment(expert, start, end)


def synthetic_set(
    spec: TrialSpec, data: Dataset, state: DistillState, repeat: int = 0
) -> SyntheticSet:
    """The set that a trial stands for at ``state``, with the protocol of the final evaluation."""
    cpu = torch.device("cpu")
    return SyntheticSet(
        images=state.ema_images.to(cpu),
        labels=state.label_targets.to(cpu),
        syn_lr=state.syn_lr.item(),
        normalisation=data.normalisation.to(cpu),
        class_names=data.description.class_names,
        protocol=Protocol.of(spec.evaluate, network=spec.network, augment=data.strategy),
        provenance={
            "ftd": __version__,
            "trial": spec.number,
            "experts": spec.identity,
            "expert_count": spec.experts,
            "distill": asdict(spec.distill),
            "numerics": asdict(spec.numerics),
            "seed": spec.distill_seed(repeat),
            "step": state.step,
        },
    )


@dataclass(frozen=True)
class Checkpoint:
    """All that a trial goes on from."""

    finals: tuple[float, ...] = ()
    """Accuracies that its finished repeats ended with."""
    state: DistillState | None = None
    """Of the repeat under way; None at its start."""


def save_checkpoint(spec: TrialSpec, checkpoint: Checkpoint) -> None:
    """Keeps a checkpoint, in the place of the one before."""
    buffer = io.BytesIO()
    state = checkpoint.state
    arrays: dict[str, Any] = {
        "spec": np.array(_fingerprint(spec)),
        "finals": np.array(checkpoint.finals),
        **({} if state is None else state.arrays()),
    }
    np.savez(buffer, **arrays)
    _write(spec, spec.checkpoint, buffer.getvalue())


def load_checkpoint(spec: TrialSpec, device: torch.device) -> Checkpoint:
    """The checkpoint of this very trial; one of another configuration does not count."""
    try:
        kept = read_bytes(spec.checkpoint)
    except (OSError, pa.ArrowException) as error:
        raise place_error(spec.folder, "the trial's folder", error, verb="read") from error
    if kept is None:
        return Checkpoint()
    with np.load(io.BytesIO(kept), allow_pickle=False) as file:
        if str(file["spec"]) != _fingerprint(spec):
            return Checkpoint()
        finals = tuple(map(float, file["finals"])) if "finals" in file.files else ()
        arrays = {k: file[k] for k in file.files if k not in ("spec", "finals")}
    state = DistillState.from_arrays(arrays, device) if arrays else None
    return Checkpoint(finals, state)


def _fingerprint(spec: TrialSpec) -> str:
    facts = [spec.distill_seed(0), spec.identity, spec.experts, asdict(spec.distill)]
    return json.dumps(facts, sort_keys=True)


# --- the end of a sweep ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FinalSpec:
    """Fresh networks for the end: on a distilled set, or on random real images."""

    dataset: DatasetConfig
    sender: Sender | None = None
    numerics: Numerics
    seed: int
    synthetic: bytes
    """The file of the set; for the baseline its protocol and IPC count."""
    networks: range
    """Which fresh networks."""
    baseline_lr: float | None = None
    """Learning rate on random real images; None evaluates the distilled set."""
    test: bool = True
    """Whether they see test images too."""


def final_scores(spec: FinalSpec) -> list[tuple[float, float]]:
    """(validation, test) accuracy of each fresh network by the full protocol; NaN for no test."""
    device = spec.numerics.apply()
    data = _data(spec, device)
    synthetic = SyntheticSet.load(io.BytesIO(spec.synthetic))
    name, count = synthetic.protocol.network, len(synthetic.images)
    gradients = _final_gradients(name, count, data, spec.numerics)
    seed = derive_seed(spec.seed, "final")
    scores = []
    for i in spec.networks:
        if spec.baseline_lr is None:
            images, labels = synthetic.images.to(device), synthetic.labels.to(device)
            lr = synthetic.syn_lr
        else:
            ipc = len(synthetic.images) // len(synthetic.class_names)
            images, labels = random_real(data, ipc, seed=seed, index=i)
            lr = spec.baseline_lr
        w = train_fresh(gradients, images, labels, lr, synthetic.protocol, seed=seed, index=i)
        test = accuracy(gradients, w, data.test) if spec.test else nan
        scores.append((accuracy(gradients, w, data.val), test))
    return scores


@dataclass(frozen=True, kw_only=True)
class WholeDataSpec:
    """The baseline of all data: the experts themselves, at the end of their trajectories."""

    dataset: DatasetConfig
    sender: Sender | None = None
    numerics: Numerics
    network: str
    identity: dict[str, Any]
    """Of the expert set."""
    experts: int
    """How many of them."""
    epochs: int
    store_uri: str


def whole_data_scores(spec: WholeDataSpec) -> list[float]:
    """Test accuracy of each expert: a network that was trained on the whole training data.

    None at all when the store does not give them any more: that is worth no sweep.
    """
    device = spec.numerics.apply()
    data = _data(spec, device)
    gradients = _final_gradients(spec.network, 0, data, spec.numerics)
    experts = TrajectoryStore(spec.store_uri).expert_set(spec.identity)
    try:
        ends = [experts.segment(e, spec.epochs, spec.epochs)[1] for e in range(spec.experts)]
    except (UserError, OSError):
        return []
    return [accuracy(gradients, torch.tensor(w, device=device), data.test) for w in ends]
