"""python -m ftd: experts, distill, evaluate, export, one after the other on digits."""

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ftd.__main__ import main
from ftd.synthetic import SyntheticSet

DATA = ["--dataset.name", "digits"]
EXPERTS = [
    "experts", *DATA, "--experts.network", "ConvNetD1W8", "--experts.count", "2",
    "--experts.epochs", "3", "--experts.lr", "0.1", "--experts.rho", "0.01",
]  # fmt: skip
DISTILL = [
    "distill", *DATA, "--distill.ipc", "1", "--distill.syn_steps", "3", "--distill.iterations", "4",
    "--distill.lr_img", "5", "--distill.lr_init", "0.05", "--distill.ema_decay", "0.5",
    "--evaluate.epochs", "6", "--evaluate.search_epochs", "3", "--evaluate.search_networks", "1",
    "--evaluate.every", "2",
]  # fmt: skip


def call(*arguments: str | Path | Sequence[str]) -> int:
    flat: list[str] = []
    for a in arguments:
        flat += [str(a)] if isinstance(a, str | Path) else list(a)
    return main(flat)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with experts and a distilled set, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    assert call(EXPERTS, "--threads", "1", "--out", folder / "experts") == 0
    assert (
        call(
            DISTILL, "--threads", "1", "--experts", folder / "experts", "--out", folder / "set.npz"
        )
        == 0
    )
    return folder


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_the_set_holds_all_that_its_accuracy_depends_on(made: Path) -> None:
    one = SyntheticSet.load(made / "set.npz")
    assert one.images.shape == (10, 1, 8, 8)
    assert one.labels.tolist() == list(range(10))
    assert one.syn_lr > 0 and one.syn_lr != 0.05
    assert one.protocol.network == "ConvNetD1W8" and one.protocol.epochs == 6
    assert one.class_names == tuple("0123456789")
    assert one.provenance["distill"]["iterations"] == 4


def test_the_same_commands_twice_write_the_same_files_bit_for_bit(
    made: Path, tmp_path: Path
) -> None:
    assert call(EXPERTS, "--threads", "1", "--out", tmp_path / "experts") == 0
    assert contents(tmp_path / "experts") == contents(made / "experts")
    code = call(
        DISTILL, "--threads", "1", "--experts", tmp_path / "experts", "--out", tmp_path / "set.npz"
    )
    assert code == 0
    assert (tmp_path / "set.npz").read_bytes() == (made / "set.npz").read_bytes()


def test_experts_that_are_there_are_left_as_they_are_and_further_ones_added(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(EXPERTS, "--out", tmp_path / "experts")
    before = contents(tmp_path / "experts")
    capsys.readouterr()
    assert call(EXPERTS, "--out", tmp_path / "experts") == 0
    assert "expert 1: 3 epochs are there" in capsys.readouterr().out
    assert contents(tmp_path / "experts") == before
    more = ["--experts.count", "3", "--experts.epochs", "7"]
    assert call(EXPERTS, more, "--out", tmp_path / "experts") == 0
    after = contents(tmp_path / "experts")
    assert before.items() < after.items()
    assert any(name.startswith("expert-0002") for name in after)


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluate_prints_the_set_beside_random_real_images(
    made: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    assert call("evaluate", made / "set.npz", DATA, "--networks", "2", "--split", split) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("distilled") and f"({split}, 2 networks)" in lines[0]
    assert lines[1].startswith("random real") and "same protocol, learning rate" in lines[1]


def test_images_of_parquet_are_read_by_the_columns_that_flags_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for i in range(24):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(buffer, "PNG")
        rows.append({"img": {"bytes": buffer.getvalue()}, "kind": i % 2})
    rows[5]["img"]["bytes"] = b""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    flags = ["experts", "--dataset.name", "parquet", "--dataset.root", str(tmp_path)]
    flags += ["--dataset.resolution", "8", "--experts.network", "ConvNetD1W8"]
    flags += ["--experts.count", "1", "--experts.epochs", "1", "--out", str(tmp_path / "experts")]
    assert call(flags) == 2
    assert "its columns are img, kind" in capsys.readouterr().err
    columns = ["--dataset.columns", "image=img,label=kind"]
    assert call(flags, columns) == 2
    assert "train-0.parquet, row 5 (empty file)" in capsys.readouterr().err
    assert call(flags, columns, "--dataset.on_unreadable", "skip") == 0
    said = capsys.readouterr()
    assert "1 experts in" in said.out
    assert "left out 1 unreadable images: train-0.parquet, row 5 (empty file)" in said.err
    with pytest.raises(SystemExit):
        call(flags, "--dataset.columns", "img")
    assert "'img' is not KEY=VALUE" in capsys.readouterr().err


def test_export_writes_a_picture_and_a_folder(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(
        "export", made / "set.npz", "--picture", tmp_path / "grid.png", "--folder", tmp_path / "png"
    )
    assert code == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (10 * 100 + 4, 104)
    assert len(list((tmp_path / "png").rglob("*.png"))) == 10


def test_soft_labels_and_zca_go_through_every_command(tmp_path: Path) -> None:
    zca = ["--dataset.zca"]
    assert call(EXPERTS, zca, "--out", tmp_path / "e") == 0
    soft = ["--distill.labels", "soft"]
    assert call(DISTILL, zca, soft, "--experts", tmp_path / "e", "--out", tmp_path / "s.npz") == 0
    one = SyntheticSet.load(tmp_path / "s.npz")
    assert one.normalisation.kind == "zca" and one.labels.shape == (10, 10)
    np.testing.assert_allclose(one.labels.sum(1).numpy(), 1, rtol=1e-5)
    # evaluation takes the normalisation from the file, not from its own flags
    assert call("evaluate", tmp_path / "s.npz", DATA, "--networks", "1") == 0


# --- mistakes -------------------------------------------------------------------------------

MISTAKES = {
    "unknown network": (
        ["experts", *DATA, "--experts.network", "ResNet", "--out", "OUT"],
        "network='ResNet' is not known",
    ),
    "resolution": (
        ["experts", *DATA, "--experts.network", "ConvNetD4", "--out", "OUT"],
        "must be a multiple of 16, not 8",
    ),
    "no data": (
        ["experts", "--dataset.name", "parquet", "--dataset.root", "OUT", "--out", "OUT"],
        "dataset.root",
    ),
    "another configuration": (
        [*EXPERTS, "--experts.lr", "0.2", "--out", "MADE/experts"],
        "holds experts of another configuration",
    ),
    "no experts": ([*DISTILL, "--experts", "OUT", "--out", "OUT.npz"], "is not an expert set"),
    "too few epochs": (
        [*DISTILL, "--distill.max_start_epoch", "9", "--experts", "MADE/experts", "--out", "O.npz"],
        "needs 10 epochs; experts have 3",
    ),
    "other data": (
        [*DISTILL, "--dataset.split_seed", "1", "--experts", "MADE/experts", "--out", "O.npz"],
        "were trained on digits",
    ),
    "other augmentation": (
        [*DISTILL, "--dataset.augment", "flip", "--experts", "MADE/experts", "--out", "OUT.npz"],
        "trained with dataset.augment=",
    ),
    "nowhere to save": (
        [*DISTILL, "--experts", "MADE/experts", "--out", "OUT/deep/set.npz"],
        "does not exist",
    ),
    "not a set": (["evaluate", "MADE/experts/set.json", *DATA], "is not a synthetic set"),
    "nothing to export": (["export", "MADE/set.npz"], "nothing to write"),
    "no threads": ([*EXPERTS, "--threads", "0", "--out", "OUT"], "must be at least 1"),
    "other images": (
        ["evaluate", "MADE/set.npz", *DATA, "--dataset.resolution", "16"],
        "dataset.resolution=8",
    ),
    "no networks": (["evaluate", "MADE/set.npz", *DATA, "--networks", "0"], "--networks"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_users_mistake_is_one_line_and_exit_code_2(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    before = contents(made)
    places = {"MADE": str(made), "OUT": str(tmp_path / "out")}
    filled = []
    for a in arguments:
        for name, place in places.items():
            a = a.replace(name, place) if a.startswith(name) else a
        filled.append(a)
    capsys.readouterr()
    assert main(filled) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ftd: ")
    assert message in lines[0]
    assert contents(made) == before


def test_a_distillation_that_diverges_exits_1_and_saves_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(
        DISTILL, "--distill.lr_init", "1e30", "--experts", made / "experts",
        "--out", tmp_path / "set.npz",
    )  # fmt: skip
    assert code == 1
    assert "the matching loss is" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["--experts.rhoo", "--experts.rh"])
def test_an_unknown_or_shortened_flag_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        call(EXPERTS, wrong, "0.1", "--out", tmp_path / "experts")
    assert caught.value.code == 2
    assert wrong in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ftd", "export", "nowhere.npz", "--picture", "x.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "nowhere.npz" in done.stderr
