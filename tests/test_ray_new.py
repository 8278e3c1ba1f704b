"""Writing a sweep for a folder of images: what it says, what it chooses, and that it runs."""

import itertools
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import optuna
import pytest
import yaml
from PIL import Image
from ray.cluster_utils import Cluster
from ray_helpers import REPOSITORY, run_sweep, summary_of

from ftd.data import DatasetConfig
from ftd.data.inspection import Inspection, Unreadable, inspect
from ftd.errors import UserError
from ftd.expert import Numerics
from ftd_ray.config import parse_config
from ftd_ray.new import pace as pacing
from ftd_ray.new.__main__ import given, main, write
from ftd_ray.new.choice import ENOUGH, FILLED, Choice, choose, scales_of
from ftd_ray.new.crew import Crew, crew_of, mean_pace
from ftd_ray.new.forecast import forecast, whole_trials
from ftd_ray.new.images import Images, images_of
from ftd_ray.new.pace import Pace, Task, measure
from ftd_ray.new.page import WIDTH as PAGE_WIDTH
from ftd_ray.new.page import page
from ftd_ray.new.programme import MOST_EFFORT, Scale, programme
from ftd_ray.new.text import LINES, WIDTH, chose, machine, measured, saw, written
from ftd_ray.sweep import main as sweep

CREW = Crew(workers=2, cpus=1, gpus=0.0, nodes=1, node_memory=16 * 10**9, start=9.0)

PACE = Pace(
    plain=0.35e-3, flat=0.65e-3, step=12e-3, fresh=4.5e-3, classify=0.16e-3,
    memory=750 * 10**6, gpu_share=0.1,
)  # fmt: skip
"""Of ConvNetD3W32 at 32 pixels with ten classes, on an ordinary core."""


def pace_at(scale: Scale, classes: int = 10, slower: float = 1.0) -> Pace:
    """As much slower than ``PACE`` as there is more to compute."""
    image = slower * scale.products / Scale(resolution=32, width=32).products
    synthetic = image * scale.ipc * classes / 10
    return replace(
        PACE,
        plain=image * PACE.plain,
        flat=image * PACE.flat,
        step=synthetic * PACE.step,
        fresh=synthetic * PACE.fresh,
        classify=image * PACE.classify,
    )


def images(train: int = 640, classes: int = 10, side: int = 160, **changes: object) -> Images:
    """Images that lie nowhere: a fifth as many to validate on, a quarter to test on."""
    each = [n // classes for n in (train, train // 5, train // 4)]
    found = Inspection(
        class_names=tuple(f"class {k}" for k in range(classes)),
        counts={"train": (sum(each),) * classes},
        sizes=((side + 20, side),) * 3,
        grey=0,
        unreadable=(),
        duplicates=(),
    )
    dataset = DatasetConfig(name="imagefolder", root="/data/mine", val_fraction=0.2)
    counts = {name: (n,) * classes for name, n in zip(("train", "val", "test"), each, strict=True)}
    return replace(Images(dataset=dataset, found=found, channels=3, **counts), **changes)


def chosen(
    mine: Images, hours: float, *, crew: Crew = CREW, slower: float = 1.0, ipc: int | None = None
) -> Choice:
    """What is chosen where every worker has the pace of ``pace_at``."""
    scales = scales_of(mine, ipc)
    return choose(mine, scales, crew, lambda s: pace_at(s, mine.classes, slower), hours)


def draw(folder: Path, counts: dict[str, int], size: tuple[int, int] = (16, 16)) -> Path:
    """Pictures ``folder``/CLASS/N.png of noise, each class with a tint of its own."""
    rng = np.random.default_rng(0)
    for k, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 156, (size[1], size[0], 3)) + 100 * (np.arange(3) == k % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


# --- images ---------------------------------------------------------------------------------


def test_images_are_counted_as_the_sweep_will_split_them(here):
    root = draw(here / "mine", {"a": 20, "b": 30})
    dataset = DatasetConfig(name="imagefolder", root=str(root))
    mine = images_of(dataset, inspect(dataset))
    assert (mine.test, mine.val, mine.train) == ((4, 6), (3, 5), (13, 19))
    assert mine.dataset.val_fraction == 0.2  # too few to hold out less
    assert (mine.side, mine.channels, mine.classes) == (16, 3, 2)


@pytest.mark.parametrize(("train", "share"), [(600, 0.2), (1600, 0.12), (50_000, 0.1)])
def test_validation_part_is_large_enough_to_rank_trials_where_there_are_images(train, share):
    found = images().found
    found = replace(found, counts={"train": (train // 10,) * 10, "test": (5,) * 10})
    dataset = replace(images().dataset, val_fraction=None)
    assert images_of(dataset, found).dataset.val_fraction == share


def test_given_validation_part_is_left_as_it_is():
    found = replace(images().found, counts={"train": (50,) * 10, "val": (5,) * 10})
    mine = images_of(replace(images().dataset, val_fraction=None), found)
    assert mine.dataset.val_fraction is None
    assert mine.val == (5,) * 10


def test_files_that_cannot_be_read_are_left_out_and_named(here):
    root = draw(here / "mine", {"a": 9, "b": 9})
    (root / "a" / "broken.png").write_bytes(b"no picture")
    dataset = DatasetConfig(name="imagefolder", root=str(root))
    mine = images_of(dataset, inspect(dataset))
    assert mine.dataset.on_unreadable == "skip"
    assert any("1 file that cannot be read: a/broken.png" in line for line in saw(mine))


# --- scales ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "depth"), [(8, 2), (16, 2), (28, 2), (32, 3), (64, 4), (96, 4), (128, 5)]
)
def test_network_halves_images_down_to_four_pixels_or_what_they_can(resolution, depth):
    scale = Scale(resolution=resolution, width=64)
    assert scale.depth == depth
    assert scale.network == f"ConvNetD{depth}W64"


def test_scales_grow_from_small_networks_on_small_images_to_many_images_per_class():
    scales = scales_of(images(side=160), None)
    assert scales[0] == Scale(resolution=32, width=32)
    assert scales[-1] == Scale(resolution=128, width=128, ipc=10)
    products = [s.products for s in scales]
    assert products == sorted(products)


def test_images_are_not_blown_up():
    assert {s.resolution for s in scales_of(images(side=28), None)} == {32}
    assert {s.resolution for s in scales_of(images(side=20), None)} == {16}
    assert max(s.resolution for s in scales_of(images(side=64), None)) == 64


def test_given_resolution_and_images_per_class_are_kept():
    mine = images(side=160)
    mine = replace(mine, dataset=replace(mine.dataset, resolution=48))
    assert {(s.resolution, s.ipc) for s in scales_of(mine, 3)} == {(48, 3)}


@pytest.mark.parametrize(
    ("changes", "ipc", "rule"),
    [
        ({"side": 5}, None, "5 pixels on their shorter side"),
        ({}, 0, "distill.ipc=0 must lie from 1 to 64"),
        ({}, 65, "distill.ipc=65 must lie from 1 to 64"),
    ],
)
def test_images_that_no_network_can_take_are_refused(changes, ipc, rule):
    with pytest.raises(UserError, match=rule):
        scales_of(images(**changes), ipc)


# --- programmes -----------------------------------------------------------------------------


@pytest.mark.parametrize("train", [40, 640, 9_000, 1_000_000])
@pytest.mark.parametrize("workers", [1, 2, 64])
def test_sweep_of_every_effort_is_consistent(train, workers):
    mine = images(train=train, classes=4)
    for step in range(0, round(20 * MOST_EFFORT) + 1):
        p = programme(Scale(resolution=32, width=32), mine, workers, step / 20)
        crew = replace(CREW, workers=workers)
        f = forecast(p, mine, PACE, crew)
        choice = Choice(programme=p, effort=step / 20, forecast=f, pace=PACE, crew=crew)
        config = parse_config(yaml.safe_load(page(choice, mine, "mine", "command", 1.0)))
        assert config.search.concurrency <= min(workers, config.search.trials)
        assert config.distill.iterations % config.evaluate.every == 0
        assert (config.resources.trial_memory, config.distill.optimiser) == (10**9, "rmsprop")


def test_more_effort_is_more_of_everything():
    mine, scale = images(), Scale(resolution=32, width=32)
    less, more = (programme(scale, mine, 2, effort) for effort in (0.1, 0.9))
    for key in ("experts", "epochs", "iterations", "trials", "networks", "finalists"):
        assert getattr(less, key) < getattr(more, key)
    assert fmean(less.syn_steps) < fmean(more.syn_steps)


# --- forecasts ------------------------------------------------------------------------------


@pytest.mark.parametrize(("iterations", "every"), [(90, 30), (90, 10)])
def test_forecast_counts_as_many_whole_trials_as_asha_lets_through(iterations, every):
    base = programme(Scale(resolution=32, width=32), images(), 2, 0.3)
    p = replace(base, iterations=iterations, every=every, trials=30)
    rng = random.Random(0)
    steps = [_steps_under_asha(p.trials, iterations, every, rng) for _ in range(20)]
    assert whole_trials(p) == pytest.approx(fmean(steps) / iterations, rel=0.1)


def _steps_under_asha(trials: int, iterations: int, every: int, rng: random.Random) -> int:
    """Outer steps of all trials of a study in which each has one accuracy throughout."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=every, reduction_factor=3)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    total = 0
    for _ in range(trials):
        trial, value = study.ask(), rng.random()
        for step in range(every, iterations + 1, every):
            trial.report(value, step)
            if step < iterations and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, value)
        total += step
    return total


def test_forecast_is_shorter_with_more_workers_and_longer_at_a_slower_pace():
    mine, scale = images(), Scale(resolution=32, width=32)
    p = programme(scale, mine, 4, 0.5)
    base = forecast(p, mine, PACE, CREW)
    assert forecast(p, mine, PACE, replace(CREW, workers=4)).experts < base.experts
    slow = forecast(p, mine, pace_at(scale, slower=2), CREW)
    assert slow.experts == pytest.approx(2 * base.experts)
    assert base.trials < slow.trials < 2 * base.trials  # reports cost the same
    assert slow.start == base.start


# --- choices --------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [640, 9_000])
@pytest.mark.parametrize("hours", [0.2, 0.3, 1, 5, 24])
def test_choice_fills_its_hours(train, hours):
    choice = chosen(images(train=train), hours)
    assert 0.75 * FILLED * 3600 * hours <= choice.forecast.total <= FILLED * 3600 * hours


def test_more_time_is_used_for_more_search_then_for_larger_networks_and_images():
    choices = [chosen(images(), hours) for hours in (0.2, 1, 24, 500)]
    assert [c.scale for c in choices] == sorted(c.scale for c in choices)
    assert choices[0].scale.resolution == 32
    assert choices[-1].scale.resolution == 128
    assert all(c.effort >= ENOUGH for c in choices[1:])


def test_faster_machines_search_more():
    slow, fast = (chosen(images(), 0.3, slower=s) for s in (2, 0.5))
    assert slow.effort < fast.effort
    many = chosen(images(), 0.3, crew=replace(CREW, workers=16, node_memory=10**11))
    assert many.programme.trials >= 32
    assert many.programme.concurrency == 16


def test_only_scales_that_promise_enough_are_measured():
    asked: list[Scale] = []

    def measure(scale: Scale) -> Pace:
        asked.append(scale)
        return pace_at(scale)

    mine = images()
    scales = scales_of(mine, None)
    choose(mine, scales, CREW, measure, 0.2)
    assert asked == list(scales[:1])
    asked.clear()
    choice = choose(mine, scales, CREW, measure, 5)
    assert choice.scale in asked
    assert len(asked) <= scales.index(choice.scale) + 2


def test_hours_that_do_not_suffice_are_refused_with_those_that_do():
    mine = images(train=50_000)
    with pytest.raises(
        UserError, match=r"--hours 0\.1 is too short.*about (0\.\d+) here"
    ) as caught:
        chosen(mine, 0.1)
    needed = float(str(caught.value).split("takes about ")[1].split()[0])
    assert chosen(mine, needed).effort < 0.1


def test_workers_are_as_many_as_memory_has_room_for():
    crew = replace(CREW, workers=8, node_memory=3 * 10**9)
    choice = chosen(images(), 1, crew=crew)
    assert (choice.crew.workers, choice.memory) == (2, 10**9)
    assert choice.programme.concurrency == 2
    with pytest.raises(UserError, match="takes more memory than there is"):
        chosen(images(), 1, crew=replace(CREW, node_memory=10**8))


def test_workers_share_a_gpu_as_far_as_its_memory_goes():
    mine = images()
    crew = Crew(workers=8, cpus=1, gpus=0.25, nodes=1, node_memory=10**11, start=9)

    def pace(share: float) -> Callable[[Scale], Pace]:
        return lambda scale: replace(pace_at(scale, slower=0.1), gpu_share=share)

    scales = scales_of(mine, 1)
    assert choose(mine, scales, crew, pace(0.2), 1).crew == crew
    two = choose(mine, scales, crew, pace(0.4), 1).crew
    assert (two.workers, two.gpus) == (4, 0.5)
    with pytest.raises(UserError, match="takes more memory than there is"):
        choose(mine, scales, crew, pace(1.2), 1)


# --- workers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus"),
    [
        ([{"CPU": 2}], 2, 1, 0),
        ([{"CPU": 64}], 16, 4, 0),
        ([{"CPU": 8}, {"CPU": 8}, {"memory": 1}], 16, 1, 0),
        ([{"CPU": 16, "GPU": 1}], 4, 1, 0.25),
        ([{"CPU": 2, "GPU": 1}, {"CPU": 64}], 2, 1, 0.5),
        ([{"CPU": 1, "GPU": 2}], 1, 1, 1),
    ],
)
def test_workers_are_those_that_the_nodes_have_room_for(nodes, workers, cpus, gpus):
    crew = crew_of([{"memory": 8e9} | n for n in nodes])
    assert (crew.workers, crew.cpus, crew.gpus) == (workers, cpus, gpus)
    assert crew.device == ("cuda" if gpus else "cpu")


def test_cluster_without_a_cpu_is_refused():
    with pytest.raises(UserError, match="no node has a CPU"):
        crew_of([{"memory": 8e9}])


def test_pace_of_a_crew_is_its_mean_and_its_memory_the_most():
    pace = mean_pace([PACE, replace(PACE, step=3 * PACE.step, memory=10**9)])
    assert pace.step == pytest.approx(2 * PACE.step)
    assert (pace.plain, pace.memory) == (PACE.plain, 10**9)


@pytest.mark.parametrize("ipc", [1, 3])
def test_pace_is_measured_by_the_real_work(monkeypatch, ipc):
    monkeypatch.setattr(pacing, "SLICE_SECONDS", 1e-9)
    task = Task(
        network="ConvNetD2W8", channels=1, resolution=8, classes=3, ipc=ipc, batch_size=4,
        images=24, augment="none", numerics=Numerics.on("cpu", 1),
    )  # fmt: skip
    pace = measure(task)
    assert min(pace.plain, pace.flat, pace.step, pace.fresh, pace.classify) > 0
    assert 10**7 < pace.memory < 10**11
    assert pace.gpu_share == 0


# --- what is written ------------------------------------------------------------------------

FOLDERS = {
    "two-classes": ({"cat": 12, "dog": 12}, (40, 32)),
    "hundred-classes": ({f"kind {k}": 5 for k in range(100)}, (16, 12)),
    "large": ({"cat": 6, "dog": 6}, (900, 700)),
    "unequal": ({"cat": 60, "dog": 4, "owl": 3}, (33, 70)),
    "ünsere Bilder": ({"Straße: 'eins'": 6, "# zwei": 6}, (32, 32)),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_written_sweep_passes_a_dry_run_as_it_is(here, capsys, name):
    counts, size = FOLDERS[name]
    root = draw(here / name, counts, size)
    (root / next(iter(counts)) / "torn.png").write_bytes(b"")
    dataset = DatasetConfig(name="imagefolder", root=str(root))
    mine = images_of(dataset, inspect(dataset))
    choice = chosen(mine, 1)
    Path("mine.yaml").write_text(page(choice, mine, "mine", "python -m ftd_ray.new", 1))
    assert sweep(["mine.yaml", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    r = choice.scale.resolution
    assert f"3 x {r} x {r}, {len(counts)} classes; {sum(mine.train)} train" in said.out
    assert f"{choice.programme.trials} trials" in said.out


@pytest.mark.parametrize("name", ["2024", "2024-05-01", "007", "yes", "null", "1e5"])
def test_sweep_may_be_named_by_what_yaml_takes_for_something_else(here, name):
    mine = images()
    write(here / f"{name}.yaml", page(chosen(mine, 1), mine, name, "python -m ftd_ray.new", 1))
    assert yaml.safe_load((here / f"{name}.yaml").read_text())["name"] == name


def test_what_is_of_no_class_is_named_and_many_names_take_no_time():
    mine = images()
    many = tuple((f"test/{i}.png", f"train/{i}.png") for i in range(200_000))
    found = replace(mine.found, unused=("2 images directly in dataset.root",), duplicates=many)
    lines = saw(replace(mine, found=found))
    assert "not used   2 images directly in dataset.root" in lines
    assert any("200000" in line.replace(",", "") for line in lines)


def test_every_line_of_the_file_fits_and_most_say_why():
    mine = images()
    for hours in (0.2, 1, 24):
        text = page(chosen(mine, hours), mine, "mine", "python -m ftd_ray.new mine", hours)
        lines = text.splitlines()
        assert max(map(len, lines)) <= PAGE_WIDTH
        assert sum("#" in line for line in lines) > len(lines) / 2


def test_what_is_said_fits_a_terminal():
    names = [f"{'a long folder/' * 4}{i}.jpg" for i in range(50)]
    mine = images()
    found = replace(
        mine.found,
        class_names=tuple(f"{'a long name ' * 9}{k}" for k in range(10)),
        sizes=((20_000, 20_000), (100, 1), (150, 150)),
        unreadable=tuple(Unreadable(name, "truncated") for name in names),
        duplicates=tuple(itertools.pairwise(names)),
    )
    mine, crew = replace(mine, found=found), replace(CREW, workers=4, gpus=0.25, nodes=2)
    scales = scales_of(mine, None)
    for hours in (0.5, 30, 2000):
        choice = chosen(mine, hours, crew=crew)
        lines = [
            *saw(mine),
            machine(crew, Numerics.on("cuda", 1)),
            *(measured(s, pace_at(s), mine) for s in scales),
            *chose(choice, scales, mine),
            *written(Path("images-of-mine.yaml"), "head.of.a.cluster:6379", crew),
        ]
        assert len(lines) <= LINES
        assert [line for line in lines if len(line) > WIDTH] == []


def test_given_keys_are_in_the_file(here):
    root = draw(here / "mine", {"a": 12, "b": 12}, (64, 64))
    dataset, ipc = given(
        str(root), ["dataset.resolution=32", "dataset.augment=none", "distill.ipc=2"], "mine"
    )
    mine = images_of(dataset, inspect(dataset))
    choice = chosen(mine, 1, ipc=ipc)
    config = parse_config(yaml.safe_load(page(choice, mine, "mine", "command", 1)))
    assert (config.dataset.resolution, config.dataset.augment) == (32, "none")
    assert config.distill.ipc == 2


# --- the command ----------------------------------------------------------------------------


def refused(capsys, *args: str) -> str:
    """The one line of a command that is refused."""
    before = sorted(os.listdir())
    assert main(list(args)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("new: ") and said.err.count("\n") == 1
    assert sorted(os.listdir()) == before
    return said.err


@pytest.mark.parametrize(
    ("args", "rule"),
    [
        (["elsewhere"], "elsewhere is no folder"),
        (["mine", "--hours", "0"], "--hours 0 must be above 0"),
        (["mine", "--hours", "nan"], "--hours nan must be above 0"),
        (["mine", "--hours", "inf"], "--hours inf must be above 0, and finite"),
        (["mine", "--out", "there.yaml"], "there.yaml is there already"),
        (["mine", "--out", "nowhere/a.yaml"], "the folder nowhere of nowhere/a.yaml"),
        (["mine", "--out", "swept.yaml"], "runs/swept holds a sweep"),
        (["mine", "search.trials=3"], "only keys of dataset and distill.ipc"),
        (["mine", "dataset.root=one"], "only keys of dataset and distill.ipc"),
        (["mine", "distill.ipc={choice: [1, 2]}"], "distill.ipc must have one value"),
        (["mine", "distill.ipc=9"], "distill.ipc=9 must lie from 1 to 8"),
        (["mine", "dataset.resolution=30"], "dataset.resolution=30 does not do"),
        (["mine", "dataset.val_fraction=2"], "dataset.val_fraction=2"),
        (["mine", "dataset.colour=red"], "dataset.colour is not a known key"),
        (["one"], "there is one class"),
        (["few"], "the class 'b' has 2 images"),
        (["unreadable"], "none of 6 images can be read"),
        (["small"], "4 pixels on their shorter side"),
        (["empty"], "empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(here, capsys, args, rule):
    draw(here / "mine", {"a": 12, "b": 12})
    draw(here / "one", {"a": 12})
    draw(here / "few", {"a": 12, "b": 2})
    draw(here / "small", {"a": 12, "b": 12}, (4, 4))
    for path in draw(here / "unreadable", {"a": 3, "b": 3}).rglob("*.png"):
        path.write_bytes(b"")
    (here / "empty").mkdir()
    (here / "there.yaml").touch()
    (here / "runs" / "swept").mkdir(parents=True)
    (here / "runs" / "swept" / "sweep.yaml").write_text("name: swept\n")
    assert rule in refused(capsys, *args)


def test_file_that_has_come_meanwhile_is_not_written_over(here):
    Path("mine.yaml").write_text("mine")
    with pytest.raises(UserError, match="is there now"):
        write(Path("mine.yaml"), (REPOSITORY / "sweeps" / "digits.yaml").read_text())
    assert os.listdir() == ["mine.yaml"]
    assert Path("mine.yaml").read_text() == "mine"


@pytest.mark.heavy
def test_two_commands_take_a_folder_to_a_distilled_set(tmp_path):
    draw(tmp_path / "my pictures", {"red": 40, "green": 40, "blue": 40})
    ran = run_sweep(tmp_path, "my pictures", "--hours", "0.06", module="ftd_ray.new")
    assert ran.code == 0, ran.err
    assert len(ran.out.splitlines()) <= LINES
    assert ran.out.splitlines()[-1].endswith("-m ftd_ray.sweep 'my pictures.yaml'")
    assert sorted(os.listdir(tmp_path))[:2] == ["my pictures", "my pictures.yaml"]
    fewer = ["search.trials=6", "evaluate.networks=2"]
    assert run_sweep(tmp_path, "my pictures.yaml", *fewer).code == 0
    summary = summary_of(tmp_path, "my-pictures")
    assert summary["state"] == "done"
    assert summary["trials"]["failed"] == 0
    assert summary["best"]["test_accuracy"]["mean"] > 0.9


@pytest.mark.heavy
def test_cluster_is_measured_where_it_is(tmp_path):
    draw(tmp_path / "mine", {"a": 12, "b": 12})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        address = ["--address", cluster.address]
        args = ["mine", *address, "--hours", "0.5"]
        ran = run_sweep(tmp_path, *args, module="ftd_ray.new")
    finally:
        cluster.shutdown()
    assert ran.code == 0, ran.err
    assert "2 workers of 1 CPU on 2 nodes" in ran.out
    assert "that all nodes share" in ran.out
    assert " ".join(address) in ran.out
