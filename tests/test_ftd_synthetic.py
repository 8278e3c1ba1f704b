"""The synthetic set's file: whole, plain, repeatable, and good for pictures."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ftd.data import Dataset, DatasetConfig, Normalisation, load
from ftd.errors import UserError
from ftd.evaluate import Protocol
from ftd.synthetic import SyntheticSet

PROTOCOL = Protocol(
    network="ConvNetD1W8", epochs=5, batch_size=4, momentum=0.9, weight_decay=5e-4, augment="flip"
)
NAMES = ("cat", "dog/wolf", "owl")


def make(
    labels: str = "hard", *, channels: int = 3, ipc: int = 2, names: tuple[str, ...] = NAMES
) -> SyntheticSet:
    gen = torch.Generator().manual_seed(0)
    n = ipc * len(names)
    hard = torch.arange(len(names)).repeat_interleave(ipc)
    soft = torch.rand(n, len(names), generator=gen).div(4)
    soft[torch.arange(n), hard] += 1
    return SyntheticSet(
        images=torch.randn(n, channels, 8, 8, generator=gen),
        labels=hard if labels == "hard" else soft / soft.sum(1, keepdim=True),
        syn_lr=0.1 + 0.2,  # not a round number in binary
        normalisation=Normalisation(
            "standard", torch.full((channels,), 0.4), torch.full((channels,), 0.2)
        ),
        class_names=names,
        protocol=PROTOCOL,
        provenance={"dataset": {"name": "toy"}, "seed": 3},
    )


def assert_same(a: SyntheticSet, b: SyntheticSet) -> None:
    for mine, theirs in (
        (a.images, b.images),
        (a.labels, b.labels),
        (a.normalisation.mean, b.normalisation.mean),
        (a.normalisation.scale, b.normalisation.scale),
    ):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert a.syn_lr == b.syn_lr
    assert a.normalisation.kind == b.normalisation.kind
    assert (a.class_names, a.protocol, a.provenance) == (b.class_names, b.protocol, b.provenance)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_set_comes_back_bit_for_bit(tmp_path: Path, labels: str) -> None:
    original = make(labels)
    original.save(tmp_path / "set.npz")
    assert_same(SyntheticSet.load(tmp_path / "set.npz"), original)
    with open(tmp_path / "set.npz", "rb") as stream:
        assert_same(SyntheticSet.load(stream), original)
    assert [f.name for f in tmp_path.iterdir()] == ["set.npz"]


def test_the_file_is_plain_numpy_without_pickle(tmp_path: Path) -> None:
    original = make()
    original.save(tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    np.testing.assert_array_equal(arrays["images"], original.images.numpy())
    np.testing.assert_array_equal(arrays["labels"], original.labels.numpy())
    header = json.loads(str(arrays["header"]))
    assert header["syn_lr"] == original.syn_lr
    assert header["protocol"]["epochs"] == 5
    assert header["class_names"] == list(NAMES)


def test_equal_sets_give_equal_bytes_at_any_time(tmp_path: Path) -> None:
    assert make().to_bytes() == make().to_bytes()
    make().save(tmp_path / "set.npz")
    assert (tmp_path / "set.npz").read_bytes() == make().to_bytes()
    with zipfile.ZipFile(tmp_path / "set.npz") as file:  # no clock in it
        assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_any_difference_shows_in_the_bytes() -> None:
    whole = make()
    others = [
        replace(whole, images=whole.images + 1e-3),
        replace(whole, syn_lr=0.3),
        replace(whole, protocol=replace(PROTOCOL, epochs=6)),
        replace(whole, provenance={}),
        make("soft"),
    ]
    assert len({s.to_bytes() for s in [whole, *others]}) == 6


def test_saving_over_a_set_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    make("soft").save(path)
    make("hard").save(path)
    assert_same(SyntheticSet.load(path), make("hard"))


def test_a_zca_set_goes_back_to_pixels(tmp_path: Path) -> None:
    """Saved with its matrix: real images taken through the file are the pixels they were."""
    data = load(DatasetConfig(name="digits", zca=True))
    picks = torch.stack([m[0] for m in data.train.by_class])
    original = replace(
        make(channels=1, ipc=1, names=data.description.class_names),
        images=data.train.batch(picks),
        normalisation=data.normalisation,
    )
    original.save(tmp_path / "set.npz")
    loaded = SyntheticSet.load(tmp_path / "set.npz")
    assert_same(loaded, original)
    expected = (data.train.pixels(picks) * 255).round().to(torch.uint8)
    assert torch.equal(loaded.pixels(), expected)
    again = loaded.normalisation.apply(expected.float() / 255)
    torch.testing.assert_close(again, loaded.images, rtol=0, atol=1e-4)


def test_pixels_are_clipped_and_rounded() -> None:
    normalisation = Normalisation("standard", torch.tensor([0.5]), torch.tensor([0.25]))
    values = torch.tensor([-9.0, -2.0, 0.0, 2.0, 9.0]).view(5, 1, 1, 1)
    one = replace(make(channels=1), images=values, normalisation=normalisation)
    assert one.pixels().flatten().tolist() == [0, 0, 128, 255, 255]
    assert one.pixels().dtype == torch.uint8


def test_a_standard_set_of_real_images_goes_back_to_their_pixels(digits: Dataset) -> None:
    i = torch.arange(20)
    one = replace(
        make(channels=1), images=digits.train.batch(i), normalisation=digits.normalisation
    )
    assert torch.equal(one.pixels(), (digits.train.pixels(i) * 255).round().to(torch.uint8))


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_every_image_has_a_most_likely_class(labels: str) -> None:
    assert make(labels).hard_labels.tolist() == [0, 0, 1, 1, 2, 2]


# --- other files ----------------------------------------------------------------------------


def foreign(path: Path, kind: str) -> None:
    good = make().to_bytes()
    if kind == "array":
        with open(path, "wb") as stream:
            np.save(stream, np.zeros(3))
    elif kind == "pickle":
        np.savez(path, header=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "other arrays":
        np.savez(path, weights=np.zeros(3))
    elif kind == "header only":
        with np.load(path.with_suffix(".good")) as file:
            np.savez(path, header=file["header"])
    elif kind == "header of a list":
        np.savez(path, header=np.array("[1]"), images=np.zeros(3))
    else:
        path.write_bytes(
            {"text": b"hello", "empty": b"", "truncated": good[:-200], "flipped": flip(good)}[kind]
        )


def flip(data: bytes) -> bytes:
    position = data.index(make().images.numpy().tobytes()) + 5
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "empty",
        "truncated",
        "flipped",
        "array",
        "pickle",
        "other arrays",
        "header only",
        "header of a list",
    ],
)
def test_any_other_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "wrong.npz"
    path.with_suffix(".good").write_bytes(make().to_bytes())
    foreign(path, kind)
    with pytest.raises(UserError, match=r"wrong\.npz is"):
        SyntheticSet.load(path)


def test_a_missing_file_or_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.npz", tmp_path):
        with pytest.raises(UserError, match=f"{path.name} is not a synthetic set"):
            SyntheticSet.load(path)


@pytest.mark.parametrize(("key", "value"), [("version", 2), ("format", "something-else")])
def test_another_format_or_version_is_refused_by_name(
    tmp_path: Path, key: str, value: object
) -> None:
    path = tmp_path / "set.npz"
    make().save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(str(arrays.pop("header"))) | {key: value}
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    with pytest.raises(UserError, match=r"this program reads 'ftd-synthetic-set' version 1"):
        SyntheticSet.load(path)


# --- pictures -------------------------------------------------------------------------------


def test_a_grid_has_a_column_a_class_and_a_row_an_image() -> None:
    cell, margin = 48, 2
    sheet = make().grid(cell=cell)
    assert sheet.size == (3 * (cell + margin) + margin, 2 * (cell + margin) + margin)
    pixels = make().pixels()
    for k in range(3):
        for r in range(2):
            x, y = margin + k * (cell + margin), margin + r * (cell + margin)
            corner = tuple(pixels[2 * k + r, :, 0, 0].tolist())
            assert sheet.getpixel((x, y)) == sheet.getpixel((x + 5, y + 5)) == corner
            assert sheet.getpixel((x - 1, y)) == (255, 255, 255)


def test_a_grid_shows_at_most_so_many_images_a_class() -> None:
    sheet = make(ipc=5).grid(cell=24, per_class=3)
    assert sheet.size[1] == 3 * (24 + 2) + 2


def test_a_grid_of_many_classes_goes_on_below() -> None:
    names = tuple(f"class {k}" for k in range(23))
    sheet = make(ipc=2, names=names).grid(cell=24)
    assert sheet.size == (20 * 26 + 2, 2 * 2 * 26 + 2)
    pixels = make(ipc=2, names=names).pixels()
    assert sheet.getpixel((2 + 2 * 26, 2 + 3 * 26)) == tuple(pixels[2 * 22 + 1, :, 0, 0].tolist())


def test_a_grid_of_grey_images_of_an_odd_size_has_the_same_cells() -> None:
    grey = make(channels=1)
    assert grey.grid(cell=50).size == make().grid(cell=50).size
    one = replace(grey, images=grey.images[:1], labels=grey.labels[:1])
    assert one.grid(cell=4).size == (3 * 6 + 2, 6 + 2)


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_exported_folder_holds_every_image_below_its_class(
    tmp_path: Path, labels: str, channels: int
) -> None:
    one = make(labels, channels=channels)
    assert one.export_folder(tmp_path / "out") == 6
    files = sorted(f.relative_to(tmp_path / "out").as_posix() for f in tmp_path.rglob("*.png"))
    assert files == [f"{name}/000{i}.png" for name in ("cat", "dog_wolf", "owl") for i in (0, 1)]
    pixels = one.pixels().numpy()
    found = np.asarray(Image.open(tmp_path / "out/dog_wolf/0001.png"))
    expected = pixels[3][0] if channels == 1 else pixels[3].transpose(1, 2, 0)
    np.testing.assert_array_equal(found, expected)
