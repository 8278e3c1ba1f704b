"""What the plan says of memory, how many workers fit, and what a worker is kept to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ray_helpers import tiny

from ftd import memory
from ftd.data.dataset import Description
from ftd.errors import UserError
from ftd.memory import LEAST_ROOM, OVERHEAD, Need, limit_memory
from ftd_ray import limits
from ftd_ray.config import load_config, parse_config
from ftd_ray.experts.shares import EXPERTS_PER_GPU, GPU_HEADROOM, gpu_share
from ftd_ray.fit import Gpu, Machine, Worker, memory_lines, this_machine, workers
from ftd_ray.plan import make_plan

SWEEPS = Path(__file__).parents[1] / "sweeps"

IMAGENETTE = Description(
    "imagenette", tuple("abcdefghij"), 3, 128, ((852,) * 10, (95,) * 10, (393,) * 10), "-"
)
A10G = Gpu("NVIDIA A10G", 24_146_608_128)
"""What the card that cluster.yaml names says of itself."""


@pytest.fixture(autouse=True)
def _no_limit() -> Any:
    yield
    limit_memory(None)


# --- shares ---------------------------------------------------------------------------------


def test_share_of_a_gpu_is_that_of_as_many_experts_as_fit():
    full = int(100e9 * GPU_HEADROOM)
    assert gpu_share(full, int(100e9)) == 1
    assert gpu_share(full // 2, int(100e9)) == 1 / 2
    assert gpu_share(full // 2 + 1, int(100e9)) == 1
    assert gpu_share(full // 3, int(100e9)) == 1 / 3
    assert gpu_share(1, int(100e9)) == gpu_share(0, int(100e9)) == 1 / EXPERTS_PER_GPU
    with pytest.raises(UserError, match=r"takes 92\.1 GB of GPU memory.*has 100\.0 GB"):
        gpu_share(full + int(0.1e9), int(100e9))


def test_shares_leave_each_process_what_cuda_takes():
    for share in (1 / 8, 1 / 3, 0.5, 1.0):
        mine = limits.for_tensors(share, A10G.total)
        assert round(1 / share) * (mine + OVERHEAD["cuda"]) <= A10G.total


def test_what_is_measured_fits_the_share_that_comes_of_it():
    for reserved in (10**8, 10**9, 3 * 10**9, 9 * 10**9):
        for context in (3 * 10**8, 6 * 10**8, 10**9):
            need = limits.own_use(reserved, reserved + context, reserved)
            share = gpu_share(need, A10G.total)
            assert limits.for_tensors(share, A10G.total) >= reserved


def test_what_others_use_of_a_gpu_is_not_counted():
    context = OVERHEAD["cuda"]
    alone = limits.own_use(4 * 10**9, 3 * 10**9 + context, 3 * 10**9)
    assert alone == 4 * 10**9 + context
    beside = limits.own_use(4 * 10**9, 3 * 10**9 + context + 15 * 10**9, 3 * 10**9)
    assert beside == 4 * 10**9 + 2 * context


# --- the plan -------------------------------------------------------------------------------


def imagenette(*overrides: str) -> Any:
    return load_config(SWEEPS / "imagenette.yaml", overrides)


def test_two_experts_on_imagenette_share_the_card_of_the_shipped_cluster():
    expert, trial = workers(imagenette(), IMAGENETTE)
    assert expert.gpus is None  # measured, by default
    assert 9.5e9 < expert.need.total < 10.5e9
    assert [expert.fitting(n * 10**9) for n in (8, 16, 24, 40, 80)] == [0, 1, 2, 3, 7]
    assert expert.fitting(A10G.total) == 2
    assert trial.fitting(A10G.total) == 2  # of half a GPU each
    (line, fits) = memory_lines(imagenette(), IMAGENETTE, Machine(10**11, (A10G,)))
    assert line.startswith("memory     an expert about 10.")
    assert line.count(" GB of a GPU") == 2 and ", a trial about 2." in line
    assert fits == "  on NVIDIA A10G of 24.1 GB: 2 experts or 2 trials"


@pytest.mark.parametrize("name", ["imagenette", "cifar10", "cifar100"])
def test_gpu_sweeps_measure_the_share_of_an_expert(name):
    assert load_config(SWEEPS / f"{name}.yaml").resources.gpus_per_expert == "auto"


def test_experts_that_do_not_fit_their_share_are_named_with_what_to_do():
    quarter = imagenette("resources.gpus_per_expert=0.25")
    lines = memory_lines(quarter, IMAGENETTE, Machine(10**11, (A10G,)))
    assert lines[1] == "  on NVIDIA A10G of 24.1 GB: 0 experts or 2 trials"
    (line,) = lines[2:]
    assert line.startswith("  does not fit: an expert takes about 10.")
    assert "resources.gpus_per_expert=0.25 of NVIDIA A10G of 24.1 GB is 6.0 GB" in line
    assert line.endswith("Raise it to 0.5, or write auto.")
    assert memory_lines(
        imagenette("resources.gpus_per_expert=0.5"), IMAGENETTE, Machine(10**11, (A10G,))
    )[1:] == ["  on NVIDIA A10G of 24.1 GB: 2 experts or 2 trials"]


def test_experts_that_fit_no_gpu_here_are_named_with_what_to_lower():
    small = Machine(10**11, (Gpu("NVIDIA T600", 4 * 10**9),))
    lines = memory_lines(imagenette(), IMAGENETTE, small)
    expert = [x for x in lines if x.startswith("  does not fit: an expert")]
    assert len(expert) == 1
    assert "experts.batch_size=256, or the network's width" in expert[0]
    assert "NVIDIA T600 of 4.0 GB" in expert[0]


def test_plan_of_a_cluster_says_what_fits_gpus_of_some_sizes():
    lines = memory_lines(imagenette(), IMAGENETTE)
    assert lines[1] == (
        "  on a GPU of 16 GB: 1 expert or 2 trials; 24 GB: 2 or 2; 40 GB: 3 or 2; 80 GB: 7 or 2"
    )
    assert len(lines) == 2
    quarter = memory_lines(imagenette("resources.gpus_per_expert=0.25"), IMAGENETTE)
    (line,) = quarter[2:]
    assert "resources.gpus_per_expert=0.25 is enough only on GPUs of 4" in line
    assert line.endswith("or more. Raise it for smaller ones, or write auto.")


def test_trial_is_told_not_to_fit_only_when_cutting_its_batches_does_not_help():
    """At ipc 10 and no batch_syn, second order takes 8 GB; an image at a time much less."""

    def lines(*overrides: str) -> list[str]:
        found = memory_lines(imagenette(*overrides), IMAGENETTE, Machine(10**11, (A10G,)))
        return [x for x in found if x.startswith("  does not fit: a trial")]

    many = ("distill.ipc=10", "evaluate.batch_size=32")
    assert workers(imagenette(*many), IMAGENETTE)[1].need.total > 8e9
    assert lines(*many) == lines(*many, "resources.gpus_per_trial=0.3") == []
    assert len(lines(*many, "distill.gradient=direct")) == 1


def test_most_of_the_space_counts():
    wide = {"choice": ["ConvNetD2W8", "ConvNetD2W64"]}
    config = parse_config(tiny(experts__network=wide))
    data = make_plan_data(config)
    alone = parse_config(tiny(experts__network="ConvNetD2W64"))
    assert [w.need for w in workers(config, data)] == [w.need for w in workers(alone, data)]
    more = parse_config(tiny(distill__ipc={"choice": [1, 4]}))
    most = parse_config(tiny(distill__ipc=4))
    assert workers(more, data)[1].need == workers(most, data)[1].need


def make_plan_data(config: Any) -> Description:
    return make_plan(config).data


def test_plan_on_cpus_says_what_workers_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan(parse_config(tiny(search__concurrency=2)))
    line = next(x for x in plan.text([]).splitlines() if x.startswith("memory"))
    assert line == "memory     an expert about 0.8 GB, a trial about 0.8 GB"
    two = plan.text([], Machine(8 * 10**9, cpus=2))
    assert "\n  on this machine (2 CPUs, 8.0 GB): 2 experts or 2 trials at a time\n" in two
    assert "does not fit" not in two
    text = plan.text([], Machine(10**8))
    assert "does not fit: an expert takes about" in text and "this machine has 100.0 MB" in text
    assert "a trial" not in next(
        x for x in plan.experts_text([]).splitlines() if x.startswith("memory")
    )
    booked = make_plan(parse_config(tiny(resources__memory_per_trial="100MB")))
    assert "resources.memory_per_trial books 100.0 MB. Raise it." in booked.text([])


def test_more_workers_on_cpus_than_memory_holds_are_named_with_what_to_book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = Machine(4 * 10**9, cpus=16)

    def lines(**changes: Any) -> list[str]:
        config = parse_config(tiny(**({"experts__count": 16, "search__concurrency": 3} | changes)))
        return memory_lines(config, make_plan_data(config), small)[1:]

    fits, why = lines()
    assert fits == "  on this machine (16 CPUs, 4.0 GB): 5 experts or 3 trials at a time"
    assert why.startswith("  does not fit: 16 experts at a time take about 12.")
    assert why.endswith(
        "Set resources.memory_per_expert=0.8GB: no more are started then than it holds."
    )
    assert lines(resources__memory_per_expert="0.8GB") == [fits]
    assert lines(resources__max_experts_at_once=5) == [fits]
    assert lines(resources__cpus_per_expert=4) == [fits.replace("5 experts", "4 experts")]


def test_this_machine_has_memory_and_cpus():
    here = this_machine()
    assert here.memory > 10**8 and here.cpus >= 1


def test_a_worker_with_a_given_share_fits_as_often_as_the_share_says():
    need = Need(overhead=10**9, kept=10**9, step=10**9, accuracy=0)
    assert Worker("expert", need, 0.25, 0, "").fitting(12 * 10**9) == 4
    assert Worker("expert", need, 0.25, 0, "").fitting(11 * 10**9) == 0
    assert Worker("expert", need, None, 0, "").fitting(11 * 10**9) == 3


def test_worker_that_nothing_limits_takes_what_its_largest_batch_does():
    need = Need(overhead=10**9, kept=0, step=10**9, second_order=3 * 10**9, accuracy=5 * 10**9)
    free, booked = Worker("trial", need, 0, 0, ""), Worker("trial", need, 0, 1, "")
    assert (free.takes, free.least) == (6 * 10**9, 6 * 10**9)
    assert (booked.takes, booked.least) == (4 * 10**9, 2 * 10**9)


# --- what a worker is kept to ---------------------------------------------------------------


def room() -> int | None:
    """What batches of a process may take that keeps nothing."""
    return memory._room(0)


def test_memory_booked_for_a_worker_on_cpus_bounds_its_batches():
    limits.limit_worker(0, 2e9)
    assert room() == (2 * 10**9 - OVERHEAD["cpu"]) // 2
    limits.limit_worker(0, 1e6)
    assert room() == LEAST_ROOM
    limits.limit_worker(0, 0)
    assert room() is None
    limits.limit_worker(None, 2e9)
    assert room() is not None


def test_worker_on_a_gpu_is_kept_to_its_share(monkeypatch):
    """CUDA's own functions are recorded: here is no GPU to ask."""
    kept: list[float] = []
    properties = type("Properties", (), {"total_memory": A10G.total})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", kept.append)
    limits.limit_worker(0.5, 2e9)
    (fraction,) = kept
    assert fraction == (A10G.total // 2 - OVERHEAD["cuda"]) / A10G.total
    left = room()
    assert left is not None and left < fraction * A10G.total
    limits.limit_worker(1.0, 0)
    assert len(kept) == 1  # nobody is beside it
    alone = room()
    assert alone is not None and alone > 2 * left
