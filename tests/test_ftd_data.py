"""Data sets: splits, fingerprints, normalisation, and every place that images come from."""

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ftd.data import (
    Dataset,
    DatasetConfig,
    Normalisation,
    Split,
    describe,
    inspect,
    load,
    open_arrays,
)
from ftd.data import cache as cache_module
from ftd.data import dataset as dataset_module
from ftd.data.normalise import ZCA_EPS, fit_standard, fit_zca
from ftd.errors import UserError

DIGITS = DatasetConfig(name="digits")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FTD_CACHE", str(folder))
    return folder


def everything(split: Split) -> torch.Tensor:
    return split.pixels(torch.arange(len(split)))


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def make_folder(root: Path, part: str | None, per_class: dict[str, int], seed: int = 0) -> None:
    for name, count in per_class.items():
        folder = root / part / name if part else root / name
        folder.mkdir(parents=True)
        for i in range(count):
            seed += 1
            picture(seed).save(folder / f"{i:03d}.png")


def png(image: Image.Image, path: Path) -> bytes:
    image.save(path, format="png")
    return path.read_bytes()


def write_parquet(
    path: Path, labels: list[int], scratch: Path, names: list[str] | None = None, seed: int = 0
) -> None:
    images = [
        {"bytes": png(picture(seed + i), scratch / "one.png"), "path": f"{i}.png"}
        for i in range(len(labels))
    ]
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ]
    )
    if names:
        info = {"info": {"features": {"label": {"names": names}}}}
        schema = schema.with_metadata({"huggingface": json.dumps(info)})
    table = pa.Table.from_pydict({"image": images, "label": labels}, schema=schema)
    pq.write_table(table, path)


# --- splits ---------------------------------------------------------------------------------


def positions(data: Dataset) -> list[set[int]]:
    return [set(s._index.tolist()) for s in (data.train, data.val, data.test)]


def test_splits_are_disjoint_and_cover_everything(digits: Dataset) -> None:
    train, val, test = positions(digits)
    assert not train & val and not train & test and not val & test
    assert train | val | test == set(range(1797))
    assert tuple(map(len, (train, val, test))) == digits.description.sizes


def test_validation_takes_its_share_of_every_class(digits: Dataset) -> None:
    train, val = (np.bincount(s.labels.numpy(), minlength=10) for s in (digits.train, digits.val))
    assert tuple(train) == digits.description.per_class
    np.testing.assert_allclose(val / (train + val), 0.1, atol=0.5 / (train + val).min())


def test_the_split_seed_moves_validation_images_and_leaves_test_alone(digits: Dataset) -> None:
    train, val, test = positions(digits)
    other_train, other_val, other_test = positions(load(replace(DIGITS, split_seed=1)))
    assert val != other_val and len(val) == len(other_val)
    assert train | val == other_train | other_val
    assert test == other_test


def test_the_validation_fraction_sets_its_size(digits: Dataset) -> None:
    third = load(replace(DIGITS, val_fraction=1 / 3))
    share = len(third.val) / (len(third.train) + len(third.val))
    assert share == pytest.approx(1 / 3, abs=0.01)


def test_labels_belong_to_their_images(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    for split in (digits.train, digits.val, digits.test):
        i = split._index.numpy()
        np.testing.assert_array_equal(split.labels.numpy(), raw.target[i])
        expected = torch.from_numpy(raw.images[i] / 16).float()[:, None]
        assert torch.allclose(everything(split), expected, atol=0.5 / 255 + 1e-6)


def test_by_class_lists_every_position_once(digits: Dataset) -> None:
    members = digits.val.by_class
    assert sorted(torch.cat(members).tolist()) == list(range(len(digits.val)))
    for k, positions_of_k in enumerate(members):
        assert (digits.val.labels[positions_of_k] == k).all()


def test_a_class_without_a_training_image_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "data", "train", {"cat": 4, "dog": 1})
    make_folder(tmp_path / "data", "test", {"cat": 1, "dog": 1})
    with pytest.raises(UserError, match="class 'dog' has 1 image, and a class needs 2 or more"):
        describe(DatasetConfig(name="imagefolder", root=str(tmp_path / "data"), resolution=8))


def test_a_fraction_that_leaves_no_training_image_is_named(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "data", "train", {"cat": 4, "dog": 20})
    make_folder(tmp_path / "data", "test", {"cat": 1, "dog": 1})
    config = folder_config(tmp_path / "data", val_fraction=0.9)
    with pytest.raises(UserError, match=r"'cat' has no training image.*val_fraction=0\.9"):
        describe(config)


# --- fingerprint ----------------------------------------------------------------------------


def test_the_fingerprint_of_digits_is_that_of_older_stores() -> None:
    assert describe(DIGITS).fingerprint == "668948fd8a408eda541610f3a7e8d31f"


def test_the_fingerprint_names_pixels_split_resolution_and_normalisation() -> None:
    configs = [
        DIGITS,
        replace(DIGITS, split_seed=1),
        replace(DIGITS, val_fraction=0.2),
        replace(DIGITS, resolution=16),
        replace(DIGITS, zca=True),
    ]
    assert len({describe(c).fingerprint for c in configs}) == len(configs)


@pytest.mark.parametrize("same", [{"augment": "flip"}, {"resolution": 8}])
def test_what_does_not_change_the_tensors_does_not_change_the_fingerprint(
    same: dict[str, Any],
) -> None:
    assert describe(replace(DIGITS, **same)).fingerprint == describe(DIGITS).fingerprint


def test_the_test_fraction_counts_where_there_is_no_test_part(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "data", None, {"cat": 10, "dog": 10})
    config = DatasetConfig(name="imagefolder", root=str(tmp_path / "data"), resolution=8)
    other = replace(config, test_fraction=0.5)
    assert describe(config).fingerprint != describe(other).fingerprint
    assert describe(config).sizes == (14, 2, 4)
    assert describe(other).sizes == (8, 2, 10)


def test_the_fingerprint_changes_with_the_pixels(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "data", None, {"cat": 5, "dog": 5})
    config = DatasetConfig(name="imagefolder", root=str(tmp_path / "data"), resolution=8)
    before = load(config)
    picture(999, size=(14, 14)).save(tmp_path / "data/cat/000.png")
    after = load(config)
    assert before.description.fingerprint != after.description.fingerprint
    assert not torch.equal(
        torch.cat([everything(s) for s in (before.train, before.val, before.test)]),
        torch.cat([everything(s) for s in (after.train, after.val, after.test)]),
    )


def test_the_fingerprint_does_not_depend_on_where_the_data_lie(tmp_path: Path, cache: Path) -> None:
    for place in ("here", "there"):
        make_folder(tmp_path / place, None, {"cat": 5, "dog": 5})
    here, there = (
        describe(DatasetConfig(name="imagefolder", root=str(tmp_path / p), resolution=8))
        for p in ("here", "there")
    )
    assert here == there


# --- normalisation --------------------------------------------------------------------------


def test_standard_normalisation_is_mean_and_deviation_of_train(digits: Dataset) -> None:
    x = everything(digits.train).double().numpy()
    assert digits.normalisation.mean.item() == pytest.approx(x.mean(), rel=1e-5)
    assert digits.normalisation.scale.item() == pytest.approx(x.std(), rel=1e-5)
    normal = digits.train.batch(torch.arange(len(digits.train))).double()
    assert normal.mean().abs() < 1e-4 and abs(normal.std().item() - 1) < 1e-3


def test_statistics_are_taken_channel_by_channel_from_the_given_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2500, 3, 2, 4), np.uint8)
    images[:, 1] //= 2
    index = np.arange(0, 2500, 2)
    found = fit_standard(images, index)
    x = images[index] / 255
    np.testing.assert_allclose(found.mean.numpy(), x.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.scale.numpy(), x.std((0, 2, 3)), rtol=1e-6)
    pixels = torch.from_numpy(x[:5]).float()
    by_hand = (x[:5] - x.mean((0, 2, 3))[:, None, None]) / x.std((0, 2, 3))[:, None, None]
    np.testing.assert_allclose(found.apply(pixels).numpy(), by_hand, atol=1e-5)


def test_a_channel_without_variation_is_refused() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 2, 2), np.uint8)
    images[:, 2] = 7
    with pytest.raises(UserError, match="channel 2 has the same value") as caught:
        fit_standard(images, np.arange(20))
    keys = {f.name for f in fields(DatasetConfig)}
    assert set(re.findall(r"dataset\.(\w+)", str(caught.value))) <= keys


def naive_zca(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """field.md's formula by another decomposition: T = U (S + eps)^-1/2 U^T."""
    mean = x.mean(0)
    u, s, _ = np.linalg.svd((x - mean).T / np.sqrt(len(x) - 1), full_matrices=False)
    return mean, u @ np.diag(1 / np.sqrt(s**2 + 0.1)) @ u.T


def test_zca_equals_its_formula() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3000, 2, 3, 3), np.uint8)
    images[:, 1] = (images[:, 1] + images[:, 0].astype(int)) // 2  # something to decorrelate
    index = np.arange(100, 2900)
    fitted = fit_zca(images, index)
    x = images[index].reshape(len(index), -1) / 255
    mean, matrix = naive_zca(x)
    assert ZCA_EPS == 0.1
    np.testing.assert_allclose(fitted.mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(fitted.scale.numpy(), matrix, atol=1e-5)
    out = fitted.apply(torch.from_numpy(images[:50] / 255).float())
    expected = (images[:50].reshape(50, -1) / 255 - mean) @ matrix
    np.testing.assert_allclose(out.reshape(50, -1).numpy(), expected, atol=1e-4)


def test_zca_is_fit_on_training_images_in_zero_to_one_and_serves_every_split(
    digits: Dataset,
) -> None:
    white = load(replace(DIGITS, zca=True))
    mean, matrix = naive_zca(everything(digits.train).double().flatten(1).numpy())
    for split, plain in ((white.train, digits.train), (white.test, digits.test)):
        x = everything(plain).double().flatten(1).numpy()
        found = split.batch(torch.arange(len(split))).flatten(1).numpy()
        np.testing.assert_allclose(found, (x - mean) @ matrix, atol=1e-4)


def test_zca_from_the_cache_has_the_bits_of_the_one_just_fit(cache: Path) -> None:
    first, second = (load(replace(DIGITS, zca=True)).normalisation for _ in range(2))
    assert torch.equal(first.scale, second.scale) and torch.equal(first.mean, second.mean)


@pytest.mark.parametrize("zca", [False, True])
def test_normalisation_goes_there_and_back(zca: bool) -> None:
    data = load(replace(DIGITS, zca=zca))
    pixels = everything(data.test)
    there = data.normalisation.apply(pixels)
    assert there.shape == pixels.shape
    assert not torch.allclose(there, pixels, atol=0.1)
    assert torch.allclose(data.normalisation.invert(there), pixels, atol=1e-5)


def test_zca_of_large_images_is_refused_before_work() -> None:
    images = np.broadcast_to(np.zeros(1, np.uint8), (4, 3, 96, 96))
    with pytest.raises(UserError, match="zca=true needs a 27648 x 27648 matrix"):
        fit_zca(images, np.arange(4))


def test_a_data_set_can_be_seen_under_another_normalisation(digits: Dataset) -> None:
    other = Normalisation("standard", torch.tensor([0.25]), torch.tensor([2.0]))
    seen = digits.normalised_by(other)
    i = torch.arange(5)
    for name in ("train", "val", "test"):
        split = getattr(seen, name)
        assert torch.equal(split.batch(i), (getattr(digits, name).pixels(i) - 0.25) / 2)
        assert torch.equal(split.labels, getattr(digits, name).labels)
    assert seen.normalisation is other


# --- folders of images ----------------------------------------------------------------------


def folder_config(root: Path, **given: Any) -> DatasetConfig:
    return DatasetConfig(name="imagefolder", root=str(root), **({"resolution": 8} | given))


@pytest.mark.parametrize("part", ["test", "testing", "Test"])
def test_an_image_folder_with_its_own_test_part(tmp_path: Path, cache: Path, part: str) -> None:
    make_folder(tmp_path / "data", "train", {"cat": 10, "dog": 20})
    make_folder(tmp_path / "data", part, {"cat": 3, "dog": 2}, seed=100)
    data = load(folder_config(tmp_path / "data"))
    assert data.description.class_names == ("cat", "dog")
    assert data.description.sizes == (27, 3, 5)
    assert data.description.per_class == (9, 18)
    assert data.shape == (3, 8, 8)
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1]


def test_an_image_folder_without_a_test_part_is_split_by_class(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "data", None, {"cat": 10, "dog": 20})
    data = load(folder_config(tmp_path / "data"))
    assert data.description.sizes == (21, 3, 6)
    assert data.test.labels.bincount().tolist() == [2, 4]
    assert not set.intersection(*positions(data))


def test_images_are_centre_cropped_and_resized(tmp_path: Path, cache: Path) -> None:
    """A wide picture that is red at both ends: the middle is what remains."""
    folder = tmp_path / "data/a"
    folder.mkdir(parents=True)
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, :, 0], wide[:, 8:16, 0], wide[:, 8:16, 1] = 255, 0, 200
    for i in range(4):
        Image.fromarray(wide).save(folder / f"{i}.png")
    (tmp_path / "data/b").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / f"data/b/{i}.png")
    data = load(folder_config(tmp_path / "data", resolution=8))
    first = data.train.by_class[0]
    expected = torch.tensor([0, 200 / 255, 0])[:, None, None].expand(3, 8, 8)
    assert torch.allclose(data.train.pixels(first)[0], expected)


def test_images_without_a_common_size_need_a_resolution(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "data", None, {"cat": 5, "dog": 5})
    with pytest.raises(UserError, match=r"dataset\.resolution is missing"):
        describe(folder_config(tmp_path / "data", resolution=None))


def test_a_test_class_that_train_has_not_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "data", "train", {"cat": 5})
    make_folder(tmp_path / "data", "test", {"cat": 1, "wolf": 1})
    with pytest.raises(UserError, match="test/ has the class 'wolf'"):
        describe(folder_config(tmp_path / "data"))


# --- Parquet --------------------------------------------------------------------------------


def parquet_config(root: Path) -> DatasetConfig:
    return DatasetConfig(name="parquet", root=str(root), resolution=8)


@pytest.mark.parametrize("below", [".", "data"])
def test_parquet_in_the_hugging_face_layout(tmp_path: Path, cache: Path, below: str) -> None:
    root = tmp_path / "set"
    (root / below).mkdir(parents=True)
    names = ["tench", "dog"]
    labels = [0, 1] * 5
    write_parquet(root / below / "train-00000-of-00002.parquet", labels, tmp_path, names)
    write_parquet(root / below / "train-00001-of-00002.parquet", labels, tmp_path, names, 50)
    write_parquet(root / below / "test-00000-of-00001.parquet", [1, 0, 1], tmp_path, names)
    data = load(parquet_config(root))
    assert data.description.class_names == ("tench", "dog")
    assert data.description.sizes == (18, 2, 3)
    assert data.test.labels.tolist() == [1, 0, 1]
    assert data.shape == (3, 8, 8)
    short = np.asarray(picture(0).crop((1, 0, 11, 10)), np.float64).mean() / 255
    assert data.test.pixels(torch.tensor([0])).mean().item() == pytest.approx(short, abs=0.02)


def test_parquet_without_names_or_test_part(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    write_parquet(root / "train-00000-of-00001.parquet", [0, 1, 2] * 10, tmp_path)
    description = describe(parquet_config(root))
    assert description.class_names == ("0", "1", "2")
    assert description.sizes == (21, 3, 6)


def test_parquet_of_another_layout_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), path)
    with pytest.raises(UserError, match=r"no column 'image'.*its columns are text, label"):
        describe(parquet_config(tmp_path))


def test_labels_that_no_class_name_covers_are_refused(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    write_parquet(root / "train-0.parquet", [0, 1, 2] * 10, tmp_path, ["tench", "dog"])
    with pytest.raises(UserError, match="label"):
        load(parquet_config(root))


@pytest.mark.parametrize("data", [b"garbage", None, "truncated"])
def test_a_corrupted_image_in_parquet_is_named_by_file_and_row(
    tmp_path: Path, cache: Path, data: bytes | str | None
) -> None:
    root = tmp_path / "set"
    root.mkdir()
    path = root / "train-0.parquet"
    write_parquet(path, [0, 1] * 5, tmp_path)
    table = pq.read_table(path)
    images = table.column("image").to_pylist()
    images[7]["bytes"] = images[7]["bytes"][:200] if data == "truncated" else data
    column = pa.array(images, table.schema.field("image").type)
    pq.write_table(table.set_column(0, "image", column), path)
    with pytest.raises(UserError, match=r"1 of 10 images.*train-0\.parquet, row 7 \("):
        load(parquet_config(root))


def test_real_imagenette_is_described_and_decoded(imagenette_root: Path, cache: Path) -> None:
    config = DatasetConfig(name="imagenette", root=str(imagenette_root), resolution=32)
    data = load(config)
    description = data.description
    assert description.class_names[:3] == ("tench", "English springer", "cassette player")
    assert (description.classes, description.channels) == (10, 3)
    assert description.sizes[0] + description.sizes[1] == 9469
    assert description.sizes[2] == 3925
    assert sum(description.per_class) == description.sizes[0]
    assert description.fingerprint == "83214ae69ee4cbb890135229d12930e4"  # of older stores
    x = data.test.batch(torch.arange(1000))
    assert x.shape == (1000, 3, 32, 32)
    assert x.mean().abs() < 0.3 and 0.6 < x.std() < 1.4
    expected = torch.tensor([0.485, 0.456, 0.406])
    assert torch.equal(data.normalisation.mean, expected)
    found = inspect(config)
    assert (len(found.sizes), found.grey, found.unreadable) == (13394, 242, ())


# --- missing data ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenette", "parquet", "imagefolder", "cifar10", "mnist"])
@pytest.mark.parametrize("exists", [False, True])
def test_missing_data_are_reported_with_where_was_looked(
    tmp_path: Path, cache: Path, name: str, exists: bool
) -> None:
    root = tmp_path / "nowhere"
    if exists:
        root.mkdir()
    with pytest.raises(UserError) as caught:
        describe(DatasetConfig(name=name, root=str(root), resolution=32))
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "digit"}, "name='digit' is not known"),
        ({"name": "cifar10"}, "root is missing"),
        ({"name": "digits", "val_fraction": 0.0}, r"val_fraction=0\.0 must lie between"),
        ({"name": "digits", "val_fraction": 1.0}, r"val_fraction=1\.0 must lie between"),
        ({"name": "digits", "resolution": 0}, "resolution=0 must be at least 1"),
        ({"name": "digits", "augment": "blur"}, "names 'blur'"),
    ],
)
def test_impossible_settings_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DatasetConfig(**given)


def test_digits_are_not_flipped_by_custom_and_a_strategy_can_be_chosen(digits: Dataset) -> None:
    assert "flip" not in digits.strategy and "rotate" in digits.strategy
    assert replace(DIGITS, augment="flip").strategy == "flip"
    assert replace(DIGITS, augment="none").strategy == "none"


# --- cache ----------------------------------------------------------------------------------


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often images were decoded."""
    seen: list[str] = []
    real = dataset_module.decode_into

    def counting(*args: Any) -> None:
        seen.append("decoded")
        real(*args)

    monkeypatch.setattr(dataset_module, "decode_into", counting)
    return seen


def test_images_are_decoded_once(cache: Path, openings: list[str]) -> None:
    first, second = load(DIGITS), load(DIGITS)
    assert openings == ["decoded"]
    assert torch.equal(everything(first.train), everything(second.train))
    load(replace(DIGITS, split_seed=3))  # another split reads the same pixels
    assert openings == ["decoded"]
    load(replace(DIGITS, resolution=16))
    assert openings == ["decoded"] * 2


def test_writing_to_tensors_does_not_reach_the_cache(cache: Path) -> None:
    first = load(DIGITS)
    clean = everything(first.train).clone()
    first.train._images.zero_()
    assert torch.equal(everything(load(DIGITS).train), clean)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_fill_that_fails_leaves_nothing_and_the_next_one_succeeds(
    cache: Path, error: type[BaseException]
) -> None:
    def dies(out: np.ndarray) -> None:
        out[:2] = 1
        raise error("half way")

    with pytest.raises((error, UserError)):
        cache_module.cached_arrays("key", 4, (2,), dies)
    assert list((cache / "pixels").iterdir()) == []
    array = cache_module.cached_arrays("key", 4, (2,), lambda out: out.fill(7))
    assert (array == 7).all()

    def never(out: np.ndarray) -> None:
        raise AssertionError("filled twice")

    assert (cache_module.cached_arrays("key", 4, (2,), never) == 7).all()


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"test_fraction": 0.5}, "dataset.test_fraction=0.5 has no effect"),
        ({"columns": {"label": "y"}}, "dataset.columns=.* has no effect"),
        ({"on_unreadable": "skip"}, "dataset.on_unreadable=skip has no effect"),
        ({"download": True}, "dataset.download=true has no effect"),
        ({"root": "/data"}, "dataset.root='/data' has no effect"),
        ({"split_seed": -1}, "dataset.split_seed=-1 must be 0 or more"),
    ],
)
def test_nothing_is_accepted_and_ignored(setting: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        describe(replace(DIGITS, **setting))


def test_of_several_processes_that_start_at_once_one_decodes(cache: Path) -> None:
    started, entered = threading.Barrier(4), []

    def fill(out: np.ndarray) -> None:
        entered.append(1)
        out.fill(7)

    def reader(_: int) -> list[int]:
        started.wait()
        return cache_module.cached_arrays("key", 3, (), fill).tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reader, range(4))) == [[7, 7, 7]] * 4
    assert len(entered) == 1


def test_a_writer_that_was_overtaken_takes_what_is_there(cache: Path) -> None:
    def overtaken(out: np.ndarray) -> None:  # by another node on a shared disk: no lock holds there
        (cache / "pixels" / "key").mkdir()
        np.save(cache / "pixels" / "key" / "images.npy", np.full(3, 5, np.uint8))
        out.fill(9)

    assert cache_module.cached_arrays("key", 3, (), overtaken).tolist() == [5, 5, 5]
    assert [p.name for p in (cache / "pixels").iterdir()] == ["key"]


def test_a_cache_that_cannot_be_written_is_a_users_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Set FTD_CACHE to a folder"):
        load(DIGITS)


def test_a_damaged_index_is_made_anew(cache: Path) -> None:
    before = describe(DIGITS)
    for index in (cache / "index").iterdir():
        index.write_text("{")
    assert describe(DIGITS) == before


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTD_CACHE", "/somewhere")
    assert cache_module.cache_root() == Path("/somewhere")
    monkeypatch.delenv("FTD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_module.cache_root() == Path("/xdg/ftd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_module.cache_root() == Path(os.path.expanduser("~/.cache/ftd"))


# --- sent from elsewhere --------------------------------------------------------------------


class Elsewhere:
    """The toy instance of ``Sender``: a data set that was opened before its files went away."""

    def __init__(self, config: DatasetConfig) -> None:
        self.facts, arrays = open_arrays(config)
        self.arrays = {what: array.copy() for what, array in arrays.items()}
        self.sent: list[str] = []

    def fill(self, what: str, out: np.ndarray) -> None:
        self.sent.append(what)
        out[:] = self.arrays[what]


@pytest.mark.parametrize("zca", [False, True])
def test_a_data_set_that_is_sent_is_the_one_that_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zca: bool
) -> None:
    make_folder(tmp_path / "images", None, {"cat": 12, "dog": 12})
    config = replace(folder_config(tmp_path / "images"), resolution=6, zca=zca)
    monkeypatch.setenv("FTD_CACHE", str(tmp_path / "one"))
    there, sender = load(config), Elsewhere(config)
    (tmp_path / "images").rename(tmp_path / "away")
    monkeypatch.setenv("FTD_CACHE", str(tmp_path / "other"))
    for _ in range(2):  # the second time it is there
        here = load(config, "cpu", sender)
        assert sender.sent == (["pixels", "zca"] if zca else ["pixels"])
        assert here.description == there.description
        for name in ("train", "val", "test"):
            mine, theirs = getattr(here, name), getattr(there, name)
            assert torch.equal(
                mine.batch(torch.arange(len(mine))), theirs.batch(torch.arange(len(theirs)))
            )
            assert torch.equal(mine.labels, theirs.labels)
    assert not (tmp_path / "other" / "index").exists()
    with pytest.raises(UserError, match="images"):
        load(config)


def test_pixels_that_are_here_are_not_sent_for(cache: Path) -> None:
    load(DIGITS)
    sender = Elsewhere(DIGITS)
    assert everything(load(DIGITS, "cpu", sender).train).any()
    assert sender.sent == []


def test_sending_that_fails_leaves_nothing_and_the_next_one_succeeds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = Elsewhere(DIGITS)
    monkeypatch.setenv("FTD_CACHE", str(cache / "other"))
    arrays, sender.arrays = sender.arrays, {}
    with pytest.raises(KeyError):
        load(DIGITS, "cpu", sender)
    assert list((cache / "other" / "pixels").iterdir()) == []
    sender.arrays = arrays
    assert everything(load(DIGITS, "cpu", sender).train).any()
