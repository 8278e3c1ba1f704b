"""Evaluation: the field's protocol against torch.optim, and draws that depend on nothing else."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftd import augment
from ftd.data import Dataset
from ftd.errors import UserError
from ftd.evaluate import (
    EvaluateConfig,
    Protocol,
    Score,
    draw_real,
    evaluate,
    evaluate_random_real,
    train_fresh,
)
from ftd.expert import accuracy, network_for
from ftd.gradients import Gradients
from ftd.networks import Network
from ftd.seeds import generator

PROTOCOL = Protocol(
    network="ConvNetD1W8",
    epochs=7,
    batch_size=8,
    momentum=0.9,
    weight_decay=5e-4,
    augment=augment.FULL,
)


@pytest.fixture
def gradients(digits: Dataset) -> Gradients:
    return Gradients(network_for(PROTOCOL.network, digits.description))


@pytest.fixture
def synthetic(digits: Dataset) -> tuple[Tensor, Tensor]:
    picks = draw_real(digits.train, 2, torch.Generator().manual_seed(0))
    return digits.train.batch(picks), digits.train.labels[picks]


def with_torch_optim(
    network: Network, images: Tensor, labels: Tensor, protocol: Protocol, *, lr: float, index: int
) -> Tensor:
    """Halves by building a second optimiser, which starts without momentum."""
    gen = generator(0, "evaluate", index)
    w = network.init(gen).requires_grad_()

    def optimiser(lr: float) -> torch.optim.SGD:
        return torch.optim.SGD(
            [w], lr=lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay
        )

    current = optimiser(lr)
    for epoch in range(protocol.epochs):
        if epoch == protocol.epochs // 2:
            current = optimiser(lr / 10)
        order = torch.randperm(len(images), generator=gen)
        for first in range(0, len(order), protocol.batch_size):
            i = order[first : first + protocol.batch_size]
            draw = augment.draw(protocol.augment, len(i), gen)
            current.zero_grad()
            F.cross_entropy(network(w, augment.apply(draw, images[i])), labels[i]).backward()
            current.step()
    return w.detach()


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_protocol_is_torchs_sgd_with_a_drop_and_a_fresh_momentum_at_half(
    gradients: Gradients, synthetic: tuple[Tensor, Tensor], labels: str
) -> None:
    images, y = synthetic
    if labels == "soft":
        y = (3 * F.one_hot(y, 10).float()).softmax(1)
    ours = train_fresh(gradients, images, y, 0.05, PROTOCOL, seed=0, index=2)
    theirs = with_torch_optim(gradients.network, images, y, PROTOCOL, lr=0.05, index=2)
    start = gradients.network.init(generator(0, "evaluate", 2))
    assert (ours - theirs).norm() < 1e-4 * (theirs - start).norm()


def test_the_drop_comes_after_half_of_the_epochs(
    gradients: Gradients, synthetic: tuple[Tensor, Tensor]
) -> None:
    """Without a drop factor of its own, the second half would move as far as the first."""

    def after(epochs: int, lr_drop: float) -> Tensor:
        protocol = replace(PROTOCOL, epochs=epochs, lr_drop=lr_drop, augment="none")
        return train_fresh(gradients, *synthetic, 0.02, protocol, seed=0, index=0)

    frozen = after(6, 1e-12)  # three epochs, then as good as none
    third = after(7, 1e-12)  # 7 // 2 = 3, too
    torch.testing.assert_close(frozen, third)
    assert not torch.allclose(frozen, after(8, 1e-12), atol=1e-4)


def test_networks_do_not_depend_on_order_or_company(
    digits: Dataset, gradients: Gradients, synthetic: tuple[Tensor, Tensor]
) -> None:
    def accuracies(networks: list[int]) -> tuple[float, ...]:
        return evaluate(
            gradients, *synthetic, 0.05, PROTOCOL, digits.test, networks=networks, seed=0
        ).accuracies

    torch.manual_seed(1)
    together = accuracies([0, 1, 2])
    torch.manual_seed(2)
    assert accuracies([2, 0]) == (together[2], together[0])
    assert accuracies([1]) == (together[1],)
    assert len(set(together)) == 3


def test_networks_of_another_index_or_seed_are_others(
    gradients: Gradients, synthetic: tuple[Tensor, Tensor]
) -> None:
    ends = [
        train_fresh(gradients, *synthetic, 0.05, PROTOCOL, seed=s, index=i).numpy().tobytes()
        for s in (0, 1)
        for i in (0, 1)
    ]
    assert len(set(ends)) == 4


def test_training_leaves_its_inputs_and_the_global_generator_alone(
    gradients: Gradients, synthetic: tuple[Tensor, Tensor]
) -> None:
    before = [t.clone() for t in synthetic]
    state = torch.get_rng_state()
    w = train_fresh(gradients, *synthetic, 0.05, PROTOCOL, seed=0, index=0)
    assert all(torch.equal(a, b) for a, b in zip(before, synthetic, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not w.requires_grad


def test_an_evaluation_is_the_accuracy_of_the_final_epoch(
    digits: Dataset, gradients: Gradients, synthetic: tuple[Tensor, Tensor]
) -> None:
    score = evaluate(gradients, *synthetic, 0.05, PROTOCOL, digits.val, networks=range(2), seed=3)
    expected = [
        accuracy(
            gradients,
            train_fresh(gradients, *synthetic, 0.05, PROTOCOL, seed=3, index=i),
            digits.val,
        )
        for i in range(2)
    ]
    assert list(score.accuracies) == expected


def test_real_draws_have_distinct_images_of_every_class(digits: Dataset) -> None:
    picks = draw_real(digits.train, 5, torch.Generator().manual_seed(0))
    assert len(set(picks.tolist())) == 50
    assert digits.train.labels[picks].tolist() == [k for k in range(10) for _ in range(5)]
    other = draw_real(digits.train, 5, torch.Generator().manual_seed(1))
    assert picks.tolist() != other.tolist()
    fewer = draw_real(digits.train, 1, torch.Generator().manual_seed(0))
    assert set(fewer.tolist()) <= set(picks.tolist())


def test_every_baseline_network_has_its_own_draw_of_real_images(
    digits: Dataset, gradients: Gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ftd.evaluate as module

    drawn: list[list[int]] = []

    def remember(*args: Any) -> Tensor:
        picks = draw_real(*args)
        drawn.append(picks.tolist())
        return picks

    monkeypatch.setattr(module, "draw_real", remember)
    protocol = replace(PROTOCOL, epochs=2)
    baseline = {"networks": (0, 1, 2), "seed": 0}
    three = evaluate_random_real(gradients, digits, 2, 0.05, protocol, digits.val, **baseline)
    assert len({tuple(d) for d in drawn}) == 3
    last = evaluate_random_real(
        gradients, digits, 2, 0.05, protocol, digits.val, networks=(2,), seed=0
    )
    assert drawn[3] == drawn[2] and last.accuracies == three.accuracies[2:]


def test_a_score_is_mean_and_population_deviation() -> None:
    values = (0.5, 0.75, 0.25, 0.9)
    score = Score(values)
    assert score.mean == pytest.approx(np.mean(values))
    assert score.std == pytest.approx(np.std(values))
    assert score.to_json() == {"mean": score.mean, "std": score.std, "n": 4}
    assert str(Score((0.5, 0.7))) == "60.0 ± 10.0 %"


def test_a_protocol_takes_its_numbers_from_the_configuration() -> None:
    config = EvaluateConfig(epochs=50, batch_size=3, momentum=0.1, weight_decay=0.2)
    protocol = Protocol.of(config, network="ConvNetD2", augment="flip")
    assert protocol.to_json() == {
        "network": "ConvNetD2",
        "epochs": 50,
        "batch_size": 3,
        "momentum": 0.1,
        "weight_decay": 0.2,
        "augment": "flip",
        "lr_drop": 0.1,
    }
    assert Protocol.of(config, network="ConvNetD2", augment="flip", epochs=7).epochs == 7


def test_the_defaults_are_the_fields_protocol() -> None:
    config = EvaluateConfig()
    assert (config.epochs, config.momentum, config.weight_decay) == (1000, 0.9, 5e-4)
    assert (config.batch_size, config.networks) == (256, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"networks": 0}, "networks=0 must be at least 1"),
        ({"search_epochs": 0}, "search_epochs=0 must be at least 1"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"momentum": 1.0}, r"momentum=1\.0 must lie in"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0 must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluateConfig(**given)
