"""Memory: what workers take is what the formulas say, a little less, and limits hold."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from memory_helpers import Peak

from ftd import memory
from ftd.augment import FULL
from ftd.backends import gradients_for
from ftd.data import Dataset, Normalisation, Split
from ftd.data.dataset import Description
from ftd.distill import DistillConfig, distill
from ftd.evaluate import EvaluateConfig, Protocol, evaluate
from ftd.expert import ExpertConfig, Numerics, accuracy, network_for, train_expert
from ftd.gradients import FLOAT, Gradients, Pass
from ftd.matching import InnerStep, match_direct
from ftd.memory import (
    LEAST_ROOM,
    Need,
    expert_need,
    final_need,
    limit_memory,
    trial_need,
)
from ftd.native import convnet, unavailable
from ftd.native.chunks import Workspace
from ftd.networks import Network, build_network
from ftd.seeds import generator

EAGER = Numerics.on("cpu", 1, "eager")
PASSES: tuple[Pass, ...] = ("logits", "gradient", "second_order")

NETWORKS = {
    "digits": ("ConvNetD2W64", 1, 8, 10),
    "CIFAR-10": ("ConvNetD3", 3, 32, 10),
    "CIFAR-100, narrow": ("ConvNetD3W32", 3, 32, 100),
    "shallow": ("ConvNetD1W16", 3, 16, 10),
    "Tiny ImageNet": ("ConvNetD4", 3, 64, 200),
    "Imagenette": ("ConvNetD5", 3, 128, 10),
    "deep and narrow": ("ConvNetD6W16", 3, 64, 2),
}
each_network = pytest.mark.parametrize("of", NETWORKS)


@pytest.fixture(autouse=True)
def _no_limit() -> Iterator[None]:
    yield
    limit_memory(None)


def network_of(of: str) -> Network:
    name, channels, resolution, classes = NETWORKS[of]
    return build_network(name, channels=channels, resolution=resolution, classes=classes)


def given(network: Network, n: int, device: str = "meta") -> dict[str, Any]:
    """The arguments of every pass."""
    side = network.resolution
    images = torch.ones(n, network.channels, side, side, device=device)
    targets = torch.zeros(n, dtype=torch.long, device=device)
    params = torch.ones(network.size, device=device)
    return {"logits": (params, images)} | {
        "gradient": (params, images, targets),
        "second_order": (params, images, targets, params),
    }


def peak(work: Callable[[], Any]) -> int:
    with Peak() as seen:
        result = work()
    del result
    return seen.bytes


# --- passes ---------------------------------------------------------------------------------


@each_network
@pytest.mark.parametrize("what", PASSES)
def test_autograd_takes_what_the_formula_says(of: str, what: Pass) -> None:
    network = network_of(of)
    gradients = Gradients(network)
    for n in (4, 256):
        arguments = given(network, n)[what]
        measured = peak(lambda a=arguments: getattr(gradients, what)(*a))
        said = gradients.bytes_of(what, n)
        assert measured <= said <= 1.3 * measured + 4 * FLOAT * network.size, (n, said / measured)


@pytest.mark.parametrize("of", ["digits", "CIFAR-10", "deep and narrow"])
def test_one_graph_through_all_steps_takes_what_the_formula_says(of: str) -> None:
    network, n = network_of(of), 20
    gradients, (w, x, y) = Gradients(network), given(network, n)["gradient"]
    for steps in (1, 4):
        inner = [InnerStep(None, None)] * steps
        measured = peak(lambda s=inner: match_direct(gradients, w, w, x, y, w[0], s))
        before = (steps - 1) * gradients.bytes_of("unrolled", n)
        said = gradients.bytes_of("second_order", n) + before
        assert measured <= said <= 1.3 * measured + 4 * FLOAT * network.size, (steps, said)


@each_network
@pytest.mark.parametrize("what", PASSES)
def test_native_kernels_take_what_the_formula_says(
    of: str, what: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why := unavailable():
        pytest.skip(why)
    network = network_of(of)
    gradients = gradients_for(network, "native")
    for n in (1, 2 * gradients.images_within(convnet.CHUNK) + 1):
        if n > 64:
            continue
        monkeypatch.setattr(convnet, "_SPACE", Workspace())
        arguments = given(network, n, "cpu")[what]
        measured = peak(lambda a=arguments: getattr(gradients, what)(*a))
        said = gradients.bytes_of(what, n)
        assert measured <= said <= 1.5 * measured + 12 * FLOAT * network.size, (n, said / measured)


# --- workers --------------------------------------------------------------------------------


def noise(channels: int, resolution: int, classes: int, images: int) -> Dataset:
    pixels = torch.randint(
        256, (images, channels, resolution, resolution), generator=generator(0), dtype=torch.uint8
    )
    labels, every = torch.arange(images) % classes, torch.arange(images)
    of_channels = torch.full((channels,), 0.5)
    part = Split(pixels, labels, every, Normalisation("standard", of_channels, of_channels))
    each = (images // classes,) * classes
    names = tuple(map(str, range(classes)))
    description = Description("noise", names, channels, resolution, (each, each, each), "noise")
    return Dataset(description, FULL, part._normalisation, part, part, part)


def of_tensors(need: Need) -> int:
    return need.total - need.overhead - need.scratch


def check(need: Need, measured: int, *, over: float = 1.3) -> None:
    said = of_tensors(need)
    assert measured <= said <= over * measured, said / measured


@pytest.mark.parametrize("sharpness", ["none", "gsam_adaptive"])
def test_expert_takes_what_is_said_of_it(sharpness: str) -> None:
    data = noise(3, 16, 10, 600)
    config = ExpertConfig(
        network="ConvNetD2W32", batch_size=200, momentum=0.9, sharpness=sharpness, lr=1e-3
    )
    need = expert_need(config, data.description, EAGER)
    limit_memory(of_tensors(need))
    check(need, peak(lambda: list(train_expert(config, data, 0, epochs=1))))


class Apart:
    """Segments of one expert whose every epoch is the same."""

    experts = 1

    def __init__(self, network: Network):
        self._params = network.init(generator(0)).numpy()

    def segment(self, expert: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return self._params, self._params * 0.99


def run_trial(config: DistillConfig, settings: EvaluateConfig, data: Dataset, network: str) -> None:
    of = network_for(network, data.description)
    gradients = gradients_for(of, "eager", room=memory.room_for_trial(of, config, data))
    protocol = Protocol.of(settings, network=network, augment=FULL, epochs=1)
    for state, record in distill(config, data, Apart(of), network, epochs=1, seed=0):
        evaluate(
            gradients, state.ema_images, state.label_targets, record.syn_lr, protocol, data.val,
            networks=range(2), seed=0,
        )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient": "direct"},
        {"optimiser": "sgd", "labels": "soft", "batch_syn": 30},
        {"ipc": 1, "syn_steps": 40},
    ],
    ids=["rmsprop", "direct", "soft labels, batches", "many steps"],
)
def test_trial_takes_what_is_said_of_it(changes: dict[str, Any]) -> None:
    data, network = noise(3, 16, 10, 600), "ConvNetD2W32"
    common = {"ipc": 8, "syn_steps": 5, "expert_epochs": 1, "max_start_epoch": 1, "iterations": 2}
    config = DistillConfig(**(common | {"optimiser": "rmsprop", "lr_init": 1e-3} | changes))
    settings = EvaluateConfig()
    need = trial_need(network, config, settings, data.description, EAGER)
    limit_memory(of_tensors(need))
    measured = peak(lambda: run_trial(config, settings, data, network))
    check(need, measured, over=2 if config.ipc == 1 else 1.4)
    least = final_need(network, config.ipc * 10, settings, data.description, EAGER)
    assert least.total <= need.total


def test_evaluation_on_cpu_takes_as_much_as_the_networks_that_train_at_a_time() -> None:
    config, settings = DistillConfig(ipc=50), EvaluateConfig(search_networks=3, batch_size=500)
    data = noise(3, 16, 10, 600).description
    one, two, many = (
        trial_need("ConvNetD2W32", config, settings, data, Numerics.on("cpu", threads, "eager"))
        for threads in (1, 2, 64)
    )
    assert (two.accuracy, many.accuracy) == (2 * one.accuracy, 3 * one.accuracy)
    assert many.step == 3 * one.step


def test_data_lie_in_memory_on_a_gpu_only() -> None:
    config, data = ExpertConfig(network="ConvNetD2W32"), noise(3, 16, 10, 600).description
    cpu, cuda = (expert_need(config, data, Numerics.on(d, 1, "eager")) for d in ("cpu", "cuda"))
    assert cuda.kept - cpu.kept == 3 * 600 * 3 * 16 * 16
    assert (cuda.step, cuda.accuracy) == (cpu.step, cpu.accuracy)
    whitened = expert_need(config, data, EAGER, zca=True)
    assert whitened.kept - cpu.kept == 4 * 768 * 769


# --- limits ---------------------------------------------------------------------------------


def moved(network: Network, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    gen = generator(0)
    side = network.resolution
    params = network.init(gen) + 0.1 * torch.randn(network.size, generator=gen)
    images = torch.randn(n, network.channels, side, side, generator=gen)
    targets = 1.3 * torch.rand(n, network.classes, generator=gen)
    along = torch.randn(network.size, generator=gen)
    return tuple(t.to(dtype) for t in (params, images, targets, along))


@pytest.mark.parametrize("soft", [False, True])
def test_second_order_in_pieces_is_that_of_the_whole_batch(soft: bool) -> None:
    network, n = network_of("shallow"), 7
    params, images, targets, along = moved(network, n, torch.float64)
    targets = targets if soft else targets.argmax(1)
    whole, cut = Gradients(network), Gradients(network)
    cut.room = cut.bytes_of("second_order", 3)
    assert cut.images_at_once("second_order") == 3
    a, b = (g.second_order(params, images, targets, along) for g in (whole, cut))
    for name in ("s", "grad_P", "grad_images", "grad_targets"):
        ours, theirs = getattr(b, name), getattr(a, name)
        assert (ours is None) == (theirs is None) == (name == "grad_targets" and not soft)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_batches_that_fit_are_computed_as_ever() -> None:
    network, n = network_of("shallow"), 7
    params, images, targets, along = moved(network, n, torch.float32)
    free, limited = Gradients(network), Gradients(network)
    limited.room = limited.bytes_of("second_order", n)
    a, b = (g.second_order(params, images, targets, along) for g in (free, limited))
    assert torch.equal(a.grad_P, b.grad_P) and torch.equal(a.grad_images, b.grad_images)


def test_logits_in_pieces_are_those_of_the_whole_batch() -> None:
    network = network_of("CIFAR-10")
    params, images, _, _ = moved(network, 21, torch.float32)
    whole, cut = Gradients(network), Gradients(network)
    cut.room = cut.bytes_of("logits", 8)
    assert torch.equal(whole.logits(params, images), cut.logits(params, images))
    empty = images[:0]
    assert cut.logits(params, empty).shape == whole.logits(params, empty).shape == (0, 10)


@pytest.mark.parametrize("what", ["logits", "second_order"])
def test_pass_stays_within_its_room(what: Pass) -> None:
    network = network_of("Imagenette")
    limited = Gradients(network)
    limited.room = limited.bytes_of(what, 10)
    results = FLOAT * 2 * 64 * 3 * 128**2  # images' gradients, in pieces and joined
    arguments = given(network, 64)[what]
    assert peak(lambda: getattr(limited, what)(*arguments)) <= limited.room + results
    assert peak(lambda: getattr(Gradients(network), what)(*arguments)) > 5 * limited.room


def test_a_room_too_small_for_one_image_takes_one_at_a_time() -> None:
    gradients = Gradients(network_of("Imagenette"), room=1)
    assert [gradients.images_at_once(what) for what in PASSES] == [1, 1, 1]


def test_expert_under_a_limit_is_the_same_expert() -> None:
    data = noise(3, 16, 10, 600)
    config = ExpertConfig(network="ConvNetD2W32", batch_size=64, lr=1e-3)
    free = list(train_expert(config, data, 0, epochs=1))
    limit_memory(1)
    limited = list(train_expert(config, data, 0, epochs=1))
    for a, b in zip(free, limited, strict=True):
        assert torch.equal(a.params_P, b.params_P) and a.val_accuracy == b.val_accuracy


def test_accuracy_asks_for_no_more_images_than_there_is_room_for() -> None:
    data = noise(3, 32, 10, 300)
    network = network_for("ConvNetD3", data.description)
    gradients = Gradients(network, room=LEAST_ROOM)
    w = network.init(generator(0))
    took = peak(lambda: accuracy(gradients, w, data.val))
    assert took <= LEAST_ROOM
    assert peak(lambda: accuracy(Gradients(network), w, data.val)) > 3 * LEAST_ROOM
    assert accuracy(gradients, w, data.val) == accuracy(Gradients(network), w, data.val)


def test_limit_is_what_is_left_beside_what_a_worker_keeps() -> None:
    data = noise(3, 16, 10, 600)
    network = network_for("ConvNetD2W32", data.description)
    config = DistillConfig(ipc=1)
    rooms: dict[str, Callable[[], int | None]] = {
        "expert": lambda: memory.room_for_expert(network, data),
        "trial": lambda: memory.room_for_trial(network, config, data),
        "final": lambda: memory.room_for_final(network, 10, data),
    }
    assert [room() for room in rooms.values()] == [None] * 3
    limit_memory(10**9)
    kept = {
        "expert": expert_need(ExpertConfig(network=network.name), data.description, EAGER).kept,
        "trial": trial_need(network.name, config, EvaluateConfig(), data.description, EAGER).kept,
        "final": final_need(network.name, 10, EvaluateConfig(), data.description, EAGER).kept,
    }
    assert {k: room() for k, room in rooms.items()} == {k: 10**9 - n for k, n in kept.items()}
    limit_memory(1)
    assert {room() for room in rooms.values()} == {LEAST_ROOM}


# --- what the shipped sweeps take -------------------------------------------------------------


IMAGENETTE = Description(
    "imagenette", tuple("abcdefghij"), 3, 128, ((852,) * 10, (95,) * 10, (393,) * 10), "-"
)


def test_expert_on_imagenette_takes_ten_gigabytes_of_a_gpu() -> None:
    gpu = Numerics.on("cuda", 1, "eager")
    need = expert_need(ExpertConfig(network="ConvNetD5", batch_size=256), IMAGENETTE, gpu)
    assert 9.5e9 < need.total < 10.5e9
    assert need.uncut == need.total > need.accuracy > 8e9
    smaller = replace(ExpertConfig(network="ConvNetD5", batch_size=64))
    cut = expert_need(smaller, IMAGENETTE, gpu)
    assert cut.total < 3.8e9 < 9e9 < cut.uncut


def test_trial_on_imagenette_is_bound_by_what_it_evaluates_on() -> None:
    gpu = Numerics.on("cuda", 1, "eager")
    needs = {
        ipc: trial_need("ConvNetD5", DistillConfig(ipc=ipc), EvaluateConfig(), IMAGENETTE, gpu)
        for ipc in (1, 10)
    }
    assert needs[1].total < 3e9 < 9e9 < needs[1].uncut
    assert needs[10].total > 8e9 and needs[10].least < 5.5e9
