"""The memory that workers take at their peak, by formulas, and the limit of this process.

In bytes: D = the data set on a GPU (on CPUs it stays mapped), I = an image and P = the parameters
in float32, b = images of a batch, n = synthetic images, N = student steps. What a pass over a batch
takes is its backend's matter (``Gradients.bytes_of``); ``kept`` stays as long as a worker works.

    worker   kept                          beside it, the largest of
    expert   D + 8 P                       gradient(b) + 3 b I;  accuracy
    trial    D + (N + 12) P + 20 n I       second order(b);  gradient(b) + 3 b I;  accuracy
    final    D + 8 P + 4 n I               gradient(b) + 3 b I;  accuracy

A sharpness-aware step is two gradients, one after the other: it takes no more than one. Accuracy
is cut to what the rest takes, and second order too where a limit demands it. The process itself
comes on top (``OVERHEAD``), and on CPUs what autograd's convolutions work in (``ONEDNN``). What
cuDNN works in does not stand here, but a measurement has it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftd.backends import gradients_for
from ftd.data.dataset import Dataset, Description
from ftd.gradients import FLOAT, Gradients
from ftd.networks import ConvNetSpec, Network, build_network

if TYPE_CHECKING:
    from ftd.distill import DistillConfig
    from ftd.evaluate import EvaluateConfig
    from ftd.expert import ExpertConfig, Numerics

CLASSIFIED = 500
"""Images whose classes are asked for at a time, where memory does not say fewer."""

SCALED = 1024
"""Training images, at most, whose standard deviation ``rmsprop`` begins with."""

OVERHEAD = {"cuda": 600 * 2**20, "cpu": 750 * 10**6}
"""Of a process before it has any tensors: CUDA's context; Python with PyTorch and Ray."""

ONEDNN = 2
"""Of what the first layer puts out for a batch: oneDNN's copies in an order of its own."""

LEAST_ROOM = 64 * 2**20
"""Batches are not cut below this: it would save nothing beside a process's overhead."""

_limit: int | None = None


def limit_memory(limit: int | None) -> None:
    """From now on, this process may take so many bytes for tensors; None for no limit."""
    global _limit
    _limit = limit


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one worker at its peak."""

    overhead: int
    """Of the process."""
    scratch: int = 0
    """What libraries work in beside tensors."""
    kept: int
    step: int
    """The largest piece of its work that is never cut: a batch's gradient."""
    second_order: int = 0
    """Of a whole batch; 0 where there is none, or where it cannot be cut."""
    accuracy: int
    """Of ``CLASSIFIED`` images."""

    @property
    def total(self) -> int:
        """With accuracy cut to what the rest takes: the same results in no more memory."""
        return self._with(max(self.step, self.second_order))

    @property
    def uncut(self) -> int:
        """Where nothing limits it."""
        return self._with(max(self.step, self.second_order, self.accuracy))

    @property
    def least(self) -> int:
        """With second order cut, too."""
        return self._with(max(self.step, min(self.second_order, LEAST_ROOM)))

    def _with(self, work: int) -> int:
        tensors = self.kept + max(work, min(self.accuracy, LEAST_ROOM))
        return self.overhead + self.scratch + tensors


def room_for_expert(network: Network, data: Dataset) -> int | None:
    """What a batch may take in this process, which trains experts; None for no limit."""
    return _room(_kept_by_expert(network, *_placed(data)))


def room_for_trial(network: Network, config: "DistillConfig", data: Dataset) -> int | None:
    """What a batch may take in this process, which distils."""
    return _room(_kept_by_trial(network, config, *_placed(data)))


def room_for_final(network: Network, images: int, data: Dataset) -> int | None:
    """What a batch may take in this process, which evaluates a set of so many images."""
    return _room(_kept_by_final(network, images, *_placed(data)))


def expert_need(
    config: "ExpertConfig", data: Description, numerics: "Numerics", *, zca: bool = False
) -> Need:
    """What training an expert takes."""
    g = _gradients(config.network, data, numerics)
    b = min(config.batch_size, data.sizes[0])
    return Need(
        overhead=OVERHEAD[numerics.device],
        scratch=_scratch(g.network, b, numerics),
        kept=_kept_by_expert(g.network, data, numerics.device, zca),
        step=_step(g, b, data, numerics.threads),
        accuracy=_accuracy(g, max(data.sizes[1:]), data, numerics.threads),
    )


def trial_need(
    network: str,
    config: "DistillConfig",
    evaluate: "EvaluateConfig",
    data: Description,
    numerics: "Numerics",
    *,
    zca: bool = False,
) -> Need:
    """What a trial takes: its start, matching steps, and evaluations on validation images."""
    g, threads = _gradients(network, data, numerics), numerics.threads
    n = config.ipc * data.classes
    b = min(config.batch_syn or n, n)
    second = g.bytes_of("second_order", b, threads)
    matching = g.bytes_of("gradient", b, threads) + 3 * b * _image(data)
    if config.gradient == "direct":  # one graph through all steps, by autograd whatever the backend
        plain, before = Gradients(g.network), config.syn_steps - 1
        matching = plain.bytes_of("second_order", b) + before * plain.bytes_of("unrolled", b)
        second = 0
    beside = side_by_side(evaluate.search_networks, numerics)
    inside = 1 if beside > 1 else threads
    e = min(evaluate.batch_size, n)
    fresh = _step(g, e, data, inside)
    looked_at = SCALED if config.optimiser == "rmsprop" else n
    start = _prepared(min(looked_at, data.sizes[0]), data)
    return Need(
        overhead=OVERHEAD[numerics.device],
        scratch=_scratch(g.network, max(b, beside * e), numerics),
        kept=_kept_by_trial(g.network, config, data, numerics.device, zca),
        step=max(matching, beside * fresh, start),
        second_order=second,
        accuracy=beside * _accuracy(g, data.sizes[1], data, inside),
    )


def final_need(
    network: str,
    images: int,
    evaluate: "EvaluateConfig",
    data: Description,
    numerics: "Numerics",
    *,
    zca: bool = False,
) -> Need:
    """What the final evaluation of a set of so many images takes, one fresh network at a time."""
    g = _gradients(network, data, numerics)
    e = min(evaluate.batch_size, images)
    return Need(
        overhead=OVERHEAD[numerics.device],
        scratch=_scratch(g.network, e, numerics),
        kept=_kept_by_final(g.network, images, data, numerics.device, zca),
        step=_step(g, e, data, numerics.threads),
        accuracy=_accuracy(g, max(data.sizes), data, numerics.threads),
    )


def side_by_side(networks: int, numerics: "Numerics") -> int:
    """Fresh networks that an evaluation trains at a time: on CPU one in each thread."""
    return max(1, min(networks, numerics.threads)) if numerics.device == "cpu" else 1


def _kept_by_expert(network: Network, data: Description, device: str, zca: bool) -> int:
    return _data(data, device, zca) + 8 * _parameters(network)


def _kept_by_trial(
    network: Network, config: "DistillConfig", data: Description, device: str, zca: bool
) -> int:
    """theta_0 ... theta_N, the images and what descends them."""
    images = 20 * config.ipc * data.classes * _image(data)
    return _data(data, device, zca) + (config.syn_steps + 12) * _parameters(network) + images


def _kept_by_final(network: Network, images: int, data: Description, device: str, zca: bool) -> int:
    return _kept_by_expert(network, data, device, zca) + 4 * images * _image(data)


def _placed(data: Dataset) -> tuple[Description, str, bool]:
    return data.description, data.train.labels.device.type, data.normalisation.kind == "zca"


def _room(kept: int) -> int | None:
    return None if _limit is None else max(LEAST_ROOM, _limit - kept)


def _gradients(network: str, data: Description, numerics: "Numerics") -> Gradients:
    shape = {"channels": data.channels, "resolution": data.resolution, "classes": data.classes}
    return gradients_for(build_network(network, **shape), numerics.backend)


def _step(g: Gradients, b: int, data: Description, threads: int) -> int:
    """A training step: reading and augmenting its batch, then its gradient."""
    return max(_prepared(b, data), g.bytes_of("gradient", b, threads) + 3 * b * _image(data))


def _scratch(network: Network, n: int, numerics: "Numerics") -> int:
    """Beside a batch of n images; native kernels copy nothing."""
    if numerics.device != "cpu" or numerics.backend == "native":
        return 0
    width = ConvNetSpec.parse(network.name).width
    return ONEDNN * FLOAT * n * network.resolution**2 * width


def _accuracy(g: Gradients, n: int, data: Description, threads: int) -> int:
    n = min(n, CLASSIFIED)
    return max(_prepared(n, data), g.bytes_of("logits", n, threads) + n * _image(data))


def _prepared(n: int, data: Description) -> int:
    """Normalising and augmenting a batch: copies of it, and where its pixels come from."""
    return n * (6 * _image(data) + 4 * FLOAT * data.resolution**2)


def _image(data: Description) -> int:
    return FLOAT * data.channels * data.resolution**2


def _parameters(network: Network) -> int:
    return FLOAT * network.size


def _data(data: Description, device: str, zca: bool) -> int:
    """Pixels on a GPU; everywhere labels and positions, and ZCA's matrix."""
    images, values = sum(data.sizes), data.channels * data.resolution**2
    pixels = images * values if device == "cuda" else 0
    return pixels + 24 * images + (FLOAT * values * (values + 1) if zca else 0)
