"""What a sweep says of its images before it begins, and what it does when they have changed."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from ray_helpers import (
    SWEEP_TIMEOUT,
    mlflow_runs,
    parse_tiny,
    run_sweep,
    summary_of,
    tiny,
    write_sweep,
)
from rich.console import Console

from ftd.data.dataset import Description
from ftd.data.unreadable import Unreadable
from ftd.errors import UserError
from ftd_ray.config import load_config
from ftd_ray.dataplan import data_lines
from ftd_ray.journal import STUDY_FILE
from ftd_ray.mended import other_images
from ftd_ray.reading import reading
from ftd_ray.search import SweepStudy, read_begun
from ftd_ray.sweep import main


def make_images(root: Path, per_class: int = 30) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            rng = np.random.default_rng([i, len(name), name == "dog"])
            pixels = rng.integers(0, 128, (8, 8, 3), np.uint8) + 127 * (name == "dog")
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root


def of_images(root: Path, **changes: Any) -> dict[str, Any]:
    dataset = {"name": "imagefolder", "root": str(root), "resolution": 8}
    return tiny(dataset=dataset, **changes)


# --- the plan -------------------------------------------------------------------------------


def description(classes: int = 3, **given: Any) -> Description:
    counts = tuple((n,) * classes for n in (200, 50, 80))
    names = tuple(f"class-{i}" for i in range(classes))
    return Description(
        name="imagefolder",
        class_names=names,
        channels=3,
        resolution=32,
        fingerprint="f",
        **({"counts": counts, "held_out": (0.1, None)} | given),
    )


def line_of(d: Description, what: str) -> str:
    (line,) = [line for line in data_lines(d) if line.startswith(what)]
    return line


def test_plan_counts_every_class_in_every_part() -> None:
    d = description(counts=((70, 80, 90), (40, 41, 42), (5, 6, 7)))
    assert line_of(d, "classes") == (
        "classes    train/validation/test of class-0: 70/40/5, class-1: 80/41/6, class-2: 90/42/7"
    )
    assert "240 train, 123 validation, 18 test" in line_of(d, "data")


def test_plan_of_many_classes_names_the_extremes() -> None:
    train = (100, 80, *range(90, 99), 120, 99)
    d = description(13, counts=(train, (10,) * 13, (7,) * 12 + (5,)))
    assert line_of(d, "classes") == (
        "classes    train 80 (class-1) to 120 (class-11), median 95; validation 10 each; "
        "test 5 (class-12) to 7 (class-0), median 7"
    )


@pytest.mark.parametrize(
    ("held_out", "text"),
    [
        ((0.1, None), "validation 0.1 of train, held out by class, test as given"),
        ((None, 0.2), "validation as given, test 0.2 of train, held out by class"),
        ((None, None), "validation as given, test as given"),
    ],
)
def test_plan_says_which_parts_were_given(held_out: Any, text: str) -> None:
    assert line_of(description(held_out=held_out), "split") == f"split      {text}"


@pytest.mark.parametrize(
    ("held_out", "remedy"),
    [((0.1, None), "raise dataset.val_fraction"), ((None, None), "give more images")],
)
def test_plan_warns_of_a_validation_part_that_cannot_rank_trials(
    held_out: Any, remedy: str
) -> None:
    counts = ((200, 200), (20, 20), (80, 80))
    d = description(2, counts=counts, held_out=held_out)
    assert line_of(d, "warning") == (
        "warning    40 validation images: two trials must differ by about 11 points to be told "
        f"apart. Better {remedy}."
    )


def test_plan_warns_of_nothing_where_there_is_nothing() -> None:
    assert [line.split()[0] for line in data_lines(description())] == ["data", "split", "classes"]
    edge = description(counts=((200, 200, 599), (34, 33, 33), (80,) * 3))
    assert not any(line.startswith("warning") for line in data_lines(edge))


def test_plan_warns_of_unequal_classes() -> None:
    d = description(counts=((200, 600, 400), (50,) * 3, (80,) * 3))
    assert "'class-1' has 600 training images and 'class-0' 200" in line_of(d, "warning")


def test_plan_names_what_is_left_out() -> None:
    unreadable = tuple(Unreadable(f"cat/{i}.png", "empty file") for i in range(2))
    d = description(unreadable=unreadable, unused=("more/",))
    assert line_of(d, "left out") == (
        "left out   2 images that cannot be read: cat/0.png (empty file), cat/1.png (empty file)"
    )
    assert line_of(d, "not used") == "not used   more/"


# --- before the first trial -----------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sweep of 60 images; its cache is its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTD_CACHE", str(tmp_path / "cache"))
    write_sweep(tmp_path, of_images(make_images(tmp_path / "images")))
    return tmp_path


def test_dry_run_reads_every_image_and_lists_what_cannot_be_read(here, capsys):
    assert main(["sweep.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "split      validation 0.1 of train, held out by class" in out
    assert "classes    train/validation/test of cat: 22/2/6, dog: 22/2/6" in out
    (here / "images/cat/003.png").write_bytes(b"")
    assert main(["sweep.yaml", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "1 of 60 images cannot be read" in said.err
    assert "cat/003.png (empty file)" in said.err
    assert main(["sweep.yaml", "--dry-run", "dataset.on_unreadable=skip"]) == 0
    out = capsys.readouterr().out
    assert "left out   1 image that cannot be read: cat/003.png (empty file)" in out
    assert not (here / "runs").exists()


def test_columns_are_a_mapping_of_the_file_and_of_overrides(tmp_path):
    parquet = {"name": "parquet", "root": str(tmp_path), "resolution": 8}
    config = parse_tiny(dataset={**parquet, "columns": {"image": "img"}})
    assert config.dataset.columns == {"image": "img"}
    assert config.resolved()["dataset"]["columns"] == {"image": "img"}
    for wrong, rule in (
        ({"image": 3}, "dataset.columns=3 must be a valid string"),
        ({"pictures": "img"}, "dataset.columns names 'pictures'"),
        ("img", "dataset.columns='img' must be a valid dictionary"),
    ):
        with pytest.raises(UserError, match=rule):
            parse_tiny(dataset={**parquet, "columns": wrong})
    with pytest.raises(UserError, match=r"dataset\.resolution cannot be searched"):
        parse_tiny(dataset={**parquet, "resolution": {"choice": [8, 16]}})


def console_of(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=80), out


def test_pass_over_images_has_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    console, out = console_of(terminal=True)
    with reading(console) as progress:
        progress(3, 4)
        progress(4, 4)
    assert "images" in out.getvalue() and "4/4" in out.getvalue()
    console, out = console_of(terminal=False)
    with reading(console, every=0) as progress:
        for done in range(1, 5):
            progress(done, 4)
    lines = out.getvalue().splitlines()
    assert [line.split(" to go")[0][:19] for line in lines] == [
        "images     2/4 read",
        "images     3/4 read",
    ]


def test_time_to_go_counts_from_the_first_image_and_not_from_imports_before_it() -> None:
    console, out = console_of(terminal=False)
    with reading(console, every=0) as progress:
        time.sleep(1.5)
        progress(1, 1000)
        progress(2, 1000)
    assert " to go" in out.getvalue() and "min" not in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_where_no_image_is_read(terminal: bool) -> None:
    console, out = console_of(terminal)
    with reading(console):
        pass
    assert "images" not in out.getvalue()


# --- other images ---------------------------------------------------------------------------


def study_in(folder: Path, ends: tuple[str, ...], fingerprint: str = "old" * 10) -> None:
    """A study that began on images of another fingerprint; ``ends`` are how its trials ended."""
    config = parse_tiny(search__trials=9)
    folder.mkdir(parents=True, exist_ok=True)
    study = SweepStudy(
        str(folder), name="tiny", space=config.space, search=config.search, seed=0, every=2, steps=4
    )
    study.remember("data", fingerprint)
    study.remember("mark", "the mark")
    for end in ends:
        number = study.next().number
        if end == "running":
            continue
        study.report(number, 2, 0.5)
        study.fail(number, "a broken image") if end == "fail" else getattr(study, end)(number)
    study.close()


def test_study_of_the_same_images_goes_on(tmp_path):
    assert other_images(str(tmp_path), "new") is None
    study_in(tmp_path, ("complete", "fail"), "new")
    assert other_images(str(tmp_path), "new") is None


@pytest.mark.parametrize("end", ["complete", "prune"])
def test_trials_that_were_measured_on_other_images_are_not_compared(tmp_path, end):
    study_in(tmp_path, (end, "fail", end))
    found = other_images(str(tmp_path), "new")
    with pytest.raises(UserError) as caught:
        found.check()
    message = str(caught.value)
    assert "2 trials measured on other images" in message and "another output.dir" in message
    assert len(message.splitlines()) == 1


def test_search_in_which_nothing_was_measured_begins_anew(tmp_path):
    study_in(tmp_path, ("fail", "running", "fail"))
    (tmp_path / "trials" / "0001").mkdir(parents=True)
    (tmp_path / "trials" / "0001" / "checkpoint").write_bytes(b"old")
    (tmp_path / "summary.json").write_text("{}")
    journal = (tmp_path / STUDY_FILE).read_bytes()
    found = other_images(str(tmp_path), "new")
    found.check()
    assert str(found).endswith("3 trials, failed or interrupted, will be done again")
    found.set_aside()
    kept = [p.name for p in tmp_path.iterdir() if p.name.startswith(STUDY_FILE)]
    assert (tmp_path / f"{STUDY_FILE}.oldoldol").read_bytes() == journal
    assert not (tmp_path / STUDY_FILE).exists() and len(kept) == 1
    assert not (tmp_path / "trials").exists() and not (tmp_path / "summary.json").exists()
    assert found.remembered == {"mark": "the mark"}
    assert other_images(str(tmp_path), "new") is None


def saved_in(here: Path, ends: tuple[str, ...]) -> Path:
    """A sweep that an earlier session left in its folder."""
    config = load_config(here / "sweep.yaml")
    folder = Path(config.output_dir)
    study_in(folder, ends)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config.resolved()))
    return folder


def test_dry_run_of_a_resume_says_what_is_done_again_and_does_nothing(here, capsys):
    folder = saved_in(here, ("fail", "fail"))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert main(["sweep.yaml", "--resume", "--dry-run", "dataset.on_unreadable=skip"]) == 0
    out = capsys.readouterr().out
    assert "changed    the images, since this sweep began" in out
    assert "2 trials, failed or interrupted, will be done again" in out
    assert "changed    dataset.on_unreadable: fail -> skip" in out
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_resume_on_other_images_is_refused_where_trials_were_measured(here, capsys):
    saved_in(here, ("fail", "complete"))
    assert main(["sweep.yaml", "--resume"]) == 2
    said = capsys.readouterr()
    assert "1 trial measured on other images" in said.err and said.err.count("\n") == 1


@pytest.mark.heavy
@pytest.mark.timeout(3 * SWEEP_TIMEOUT)
def test_sweep_that_failed_goes_on_when_its_images_are_mended(tmp_path):
    root = make_images(tmp_path / "images")
    failing = of_images(root, experts__rho=0.01, distill__lr_lr={"choice": [1e30, 1e31]})
    write_sweep(tmp_path, failing)
    first = run_sweep(tmp_path, "sweep.yaml")
    assert first.code == 1, first.out + first.err
    assert summary_of(tmp_path)["trials"] == {"complete": 0, "pruned": 0, "failed": 3}
    parent = summary_of(tmp_path)["mlflow"]["parent_run_id"]
    before = {r.info.run_id for r in mlflow_runs(tmp_path) if r.data.tags["ftd.kind"] == "trial"}
    (root / "cat" / "000.png").unlink()
    again = run_sweep(tmp_path, "sweep.yaml", "--resume")
    assert "3 trials, failed or interrupted, will be done again" in again.out, again.err
    assert summary_of(tmp_path)["trials"] == {"complete": 0, "pruned": 0, "failed": 3}
    assert summary_of(tmp_path)["experts"]["built"] == 2  # on the images as they are now
    assert summary_of(tmp_path)["mlflow"]["parent_run_id"] == parent
    runs = mlflow_runs(tmp_path)
    trials = [r for r in runs if r.data.tags["ftd.kind"] == "trial"]
    assert sorted(r.data.tags["ftd.trial"] for r in trials) == ["0", "1", "2"]
    assert not before & {r.info.run_id for r in trials}
    assert len(list((tmp_path / "runs" / "tiny").glob(f"{STUDY_FILE}.????????"))) == 1
    assert all(r.info.status != "RUNNING" for r in runs)
    begun = read_begun(str(tmp_path / "runs" / "tiny"))
    assert begun is not None and begun.remembered["mlflow_run"] == parent
