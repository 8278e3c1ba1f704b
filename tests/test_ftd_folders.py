"""Folders and Parquet files as people have them: parts, stray files, unreadable images, checks."""

import io
import json
import os
import threading
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ftd.data import DatasetConfig, Unreadable, describe, inspect, load
from ftd.data import survey as survey_module
from ftd.data.decode import decode
from ftd.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FTD_CACHE", str(folder))
    return folder


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8))


def fill(folder: Path, count: int, first: int = 0, suffix: str = ".png") -> Path:
    """``count`` images that are no others: of seeds ``first``, ``first`` + 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{first + i:03d}{suffix}"
        image(zlib.crc32(str(path).encode())).save(path)
    return folder


def lay(root: Path, **parts: dict[str, int]) -> Path:
    """A data set: part -> class -> images."""
    for part, classes in parts.items():
        for name, count in classes.items():
            fill(root / part / name, count)
    return root


def config_of(root: Path, name: str = "imagefolder", **given: Any) -> DatasetConfig:
    return DatasetConfig(name=name, root=str(root), **({"resolution": 8} | given))


def plain(root: Path, per_class: int = 10) -> Path:
    fill(root / "cat", per_class)
    fill(root / "dog", per_class)
    return root


def refused(config: DatasetConfig) -> str:
    with pytest.raises(UserError) as caught:
        describe(config)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", ")", "txt"))
    return message


# --- parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "Valid"])
@pytest.mark.parametrize("test", ["test", "testing"])
@pytest.mark.parametrize("train", ["train", "training"])
def test_parts_are_used_as_they_are_given(tmp_path: Path, train: str, val: str, test: str) -> None:
    sizes: list[dict[str, int]] = [{"cat": 6, "dog": 7}, {"cat": 2, "dog": 3}, {"cat": 4, "dog": 5}]
    lay(tmp_path / "set", **dict(zip((train, val, test), sizes, strict=True)))
    data = load(config_of(tmp_path / "set"))
    assert data.description.counts == ((6, 7), (2, 3), (4, 5))
    assert data.description.held_out == (None, None)
    assert data.val.labels.tolist() == [0] * 2 + [1] * 3


def test_validation_part_holds_its_own_pictures(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", train={"a": 3, "b": 3}, test={"a": 1, "b": 1})
    for name, colour in (("a", "red"), ("b", "blue")):
        (root / "valid" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), colour).save(root / "valid" / name / "one.png")
    val = load(config_of(root)).val
    pixels = val.pixels(torch.arange(2)).mean((2, 3))
    assert pixels.tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("val", ["val", "validation"])
def test_validation_without_test_is_validation_and_test_is_held_out(
    tmp_path: Path, val: str
) -> None:
    root = lay(tmp_path / "set", train={"a": 10, "b": 20}, **{val: {"a": 2, "b": 3}})
    description = describe(config_of(root))
    assert description.counts == ((8, 16), (2, 3), (2, 4))
    assert description.held_out == (None, 0.2)


def test_imagenette_alone_has_its_validation_part_as_test(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", train={"a": 10, "b": 20}, val={"a": 2, "b": 3})
    description = describe(config_of(root, "imagenette"))
    assert description.counts == ((9, 18), (1, 2), (2, 3))
    assert description.held_out == (0.1, None)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"val_fraction": 0.1}, "dataset.val_fraction=0.1 has no effect"),
        ({"split_seed": 3}, "dataset.split_seed=3 has no effect"),
        ({"test_fraction": 0.2}, "dataset.test_fraction=0.2 has no effect"),
    ],
)
def test_settings_of_a_split_that_was_given_are_refused(
    tmp_path: Path, given: dict[str, Any], rule: str
) -> None:
    parts = {p: {"a": 3, "b": 3} for p in ("train", "valid", "test")}
    assert rule in refused(config_of(lay(tmp_path / "set", **parts), **given))


def test_default_fraction_is_a_tenth_by_either_way_to_write_it(tmp_path: Path) -> None:
    config = config_of(plain(tmp_path / "set"))
    assert describe(config) == describe(replace(config, val_fraction=0.1, test_fraction=0.2))


def test_fingerprint_tells_in_which_part_an_image_is(tmp_path: Path) -> None:
    found = set()
    for i, names in enumerate([("valid", "test"), ("test", "valid"), ("val", "test")]):
        root = tmp_path / str(i)
        for name, size in zip(("train", *names), (4, 2, 3), strict=True):
            for k in "ab":
                (root / name / k).mkdir(parents=True)
                for j in range(size):
                    image(100 * size + 10 * ord(k) + j).save(root / name / k / f"{j}.png")
        found.add(describe(config_of(root)).fingerprint)
    assert len(found) == 3


def test_two_folders_of_one_part_are_refused(tmp_path: Path) -> None:
    parts = {p: {"a": 3, "b": 3} for p in ("train", "val", "valid")}
    assert "val/ and valid/ are the same part" in refused(config_of(lay(tmp_path / "set", **parts)))


def test_parts_without_train_are_refused(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", test={"a": 3, "b": 3}, valid={"a": 3, "b": 3})
    assert "train/ is not" in refused(config_of(root))


def test_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("car", "plane", "train"):
        fill(tmp_path / "set" / name, 4)
    assert describe(config_of(tmp_path / "set")).class_names == ("car", "plane", "train")


def test_what_is_of_no_part_is_named(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", train={"a": 9, "b": 9}, test={"a": 1, "b": 1}, more={"a": 2})
    image(1).save(root / "train" / "loose.png")
    assert describe(config_of(root)).unused == ("1 image directly in train/", "more/")


# --- stray files, names, links --------------------------------------------------------------


def test_stray_files_and_empty_folders_are_passed_over(tmp_path: Path) -> None:
    clean = describe(config_of(plain(tmp_path / "set")))
    root = tmp_path / "set"
    for name in (".ipynb_checkpoints", "__MACOSX", "empty", "cat/.hidden", "cat/@eaDir"):
        fill(root / name, 0 if name == "empty" else 2)
    for name in ("cat/Thumbs.db", "cat/.DS_Store", "dog/notes.txt", "labels.csv", "dog/._000.png"):
        (root / name).write_bytes(b"stray")
    assert describe(config_of(root)) == clean


def test_empty_folder_of_a_test_part_is_no_class(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", train={"a": 9, "b": 9}, test={"a": 1, "b": 1})
    (root / "test" / "c").mkdir()
    assert describe(config_of(root)).counts[2] == (1, 1)


def test_images_below_a_class_folder_are_of_that_class(tmp_path: Path) -> None:
    root = plain(tmp_path / "set")
    fill(root / "cat" / "2023" / "may", 3, 50)
    data = load(config_of(root, val_fraction=0.2))
    assert [sum(c) for c in zip(*data.description.counts, strict=True)] == [13, 10]


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    root = plain(tmp_path / "set")
    fill(tmp_path / "elsewhere", 6)
    (root / "wolf").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "again").symlink_to(root / "cat")
    before = describe(config_of(root))
    assert before.class_names == ("cat", "dog", "wolf")
    assert [sum(c) for c in zip(*before.counts, strict=True)] == [10, 10, 6]
    image(99).save(tmp_path / "elsewhere" / "000.png")
    assert describe(config_of(root)).fingerprint != before.fingerprint


def test_names_may_have_spaces_and_other_alphabets(tmp_path: Path) -> None:
    names = ["Café crème", "кошка", "猫 と 犬"]
    for name in names:
        fill(tmp_path / "set" / name, 4)
        image(7).save(tmp_path / "set" / name / f"{name} (1).PNG")
    data = load(config_of(tmp_path / "set"))
    assert data.description.class_names == tuple(sorted(names))


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    root = plain(tmp_path / "set")
    with open(os.fsencode(root / "cat") + b"/caf\xe9.png", "wb") as f:
        image(5).save(f, "PNG")
    with open(os.fsencode(root / "cat") + b"/bad\xe9.png", "wb") as f:
        f.write(b"?")
    assert "cat/bad\\xe9.png (not an image)" in refused(config_of(root))
    skipped = describe(config_of(root, on_unreadable="skip"))
    assert sum(map(sum, skipped.counts)) == 21
    assert skipped.unreadable[0].where.encode()


@pytest.mark.parametrize("suffix", [".JPG", ".jfif", ".gif", ".Png", ".tiff", ".webp", ".bmp"])
def test_files_are_images_by_their_endings(tmp_path: Path, suffix: str) -> None:
    kind = {".jfif": "JPEG", ".gif": "GIF"}.get(suffix)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            image(i).save(tmp_path / "set" / name / f"{i}{suffix}", kind)
    assert describe(config_of(tmp_path / "set")).sizes == (2, 2, 2)


def test_kinds_of_images_may_be_mixed(tmp_path: Path) -> None:
    root = plain(tmp_path / "set")
    for mode, ending in (
        ("L", "png"),
        ("RGBA", "png"),
        ("P", "gif"),
        ("CMYK", "jpg"),
        ("1", "bmp"),
    ):
        image(3).convert(mode).save(root / "cat" / f"{mode}.{ending}")
    Image.fromarray(np.full((7, 30), 65535, np.uint16)).save(root / "cat" / "16.png")
    data = load(config_of(root))
    assert sum(data.description.sizes) == 26 and data.shape == (3, 8, 8)
    found = inspect(config_of(root))
    assert found.grey == 3 and (30, 7) in found.sizes


def test_sets_with_special_images_have_another_fingerprint_than_by_the_first_rule(
    tmp_path: Path,
) -> None:
    root = plain(tmp_path / "set")
    describe(config_of(root))
    image(3).convert("RGBA").save(root / "cat" / "opaque.png")
    describe(config_of(root))
    clear = image(3).convert("RGBA")
    clear.putalpha(0)
    clear.save(root / "cat" / "clear.png")
    describe(config_of(root))
    rules = [p.name[-1] for p in (tmp_path / "cache" / "pixels").iterdir()]
    assert sorted(rules) == ["1", "1", "2"]


# --- unreadable images ----------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder of 20 images, of which three cannot be read."""
    root = plain(tmp_path / "set")
    (root / "cat" / "002.png").write_bytes(b"")
    whole = (root / "dog" / "004.png").read_bytes()
    (root / "dog" / "004.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "005.png").write_bytes(b"no image")
    return root


def test_all_unreadable_images_are_listed_with_reasons(damaged: Path) -> None:
    message = refused(config_of(damaged))
    assert "3 of 20 images cannot be read" in message
    assert "cat/002.png (empty file)" in message and "dog/005.png (not an image)" in message
    assert "dog/004.png (" in message and "truncated" in message
    assert "dataset.on_unreadable=skip" in message


def test_skipped_images_are_as_if_they_had_been_deleted(damaged: Path) -> None:
    skipped = describe(config_of(damaged, on_unreadable="skip"))
    assert [u.where for u in skipped.unreadable] == ["cat/002.png", "dog/004.png", "dog/005.png"]
    pixels = load(config_of(damaged, on_unreadable="skip"))
    for u in skipped.unreadable:
        (damaged / u.where).unlink()
    deleted = load(config_of(damaged))
    assert deleted.description == replace(skipped, unreadable=())
    for name in ("train", "val", "test"):
        mine, theirs = getattr(pixels, name), getattr(deleted, name)
        every = torch.arange(len(mine))
        assert torch.equal(mine.pixels(every), theirs.pixels(every))
        assert torch.equal(mine.labels, theirs.labels)


def test_skipped_images_are_skipped_at_another_resolution_too(damaged: Path) -> None:
    config = config_of(damaged, on_unreadable="skip")
    load(config)
    assert len(load(replace(config, resolution=4)).train) == len(load(config).train)


def test_long_list_of_unreadable_images_is_a_file(tmp_path: Path) -> None:
    root = plain(tmp_path / "set", 30)
    for i in range(25):
        (root / "cat" / f"{i:03d}.png").write_bytes(b"")
    message = refused(config_of(root))
    assert "25 of 60" in message and "cat/019.png (empty file), ...; all 25 are in" in message
    path = Path(message.rpartition(" are in ")[2])
    assert len(path.read_text().splitlines()) == 25
    assert "cat/024.png (empty file)" in path.read_text()


def test_class_of_unreadable_images_alone_is_named(tmp_path: Path) -> None:
    root = plain(tmp_path / "set")
    fill(root / "wolf", 4)
    for f in (root / "wolf").iterdir():
        f.write_bytes(b"")
    message = refused(config_of(root, on_unreadable="skip"))
    assert "the class 'wolf' has no image to train on" in message
    assert "Unreadable images, left out: 4" in message


def test_file_that_may_not_be_read_is_listed(tmp_path: Path) -> None:
    root = plain(tmp_path / "set")
    (root / "cat" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert "cat/photo.heic (not an image)" in refused(config_of(root))


def test_link_to_nowhere_is_listed_and_its_file_taken_when_it_comes(tmp_path: Path) -> None:
    root = plain(tmp_path / "set")
    (root / "cat" / "away.png").symlink_to(tmp_path / "fetched.png")
    (root / "cat" / "notes").symlink_to(tmp_path / "nowhere")
    assert "1 of 21 images" in (message := refused(config_of(root)))
    assert "cat/away.png (a link to nowhere)" in message
    image(7).save(tmp_path / "fetched.png")
    assert sum(describe(config_of(root)).sizes) == 21


def test_links_to_themselves_are_no_accident(tmp_path: Path) -> None:
    root = plain(tmp_path / "set")
    (root / "cat" / "round.png").symlink_to("round.png")
    (root / "round").symlink_to("round")
    config = config_of(root, on_unreadable="skip")
    assert [u.where for u in describe(config).unreadable] == ["cat/round.png"]


def test_link_to_a_folder_above_takes_in_no_other_class(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", train={"cat": 5, "dog": 5}, test={"cat": 3, "dog": 3})
    for target in (root, root / "train", tmp_path):
        link = root / "train" / "cat" / f"up{len(target.parts)}"
        link.symlink_to(target)
    found = inspect(config_of(root))
    assert found.counts == {"train": (5, 5), "test": (3, 3)}


def test_disk_that_would_not_give_a_file_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = plain(tmp_path / "set")
    read = Path.read_bytes

    def withheld(path: Path) -> bytes:
        if path.name == "003.png" and path.parent.name == "cat":
            raise PermissionError(13, "Permission denied")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", withheld)
        assert "cat/003.png (Permission denied)" in refused(config_of(root))
    assert sum(describe(config_of(root)).sizes) == 20


def test_names_that_read_alike_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = lay(tmp_path / "set", train={composed: 5, "dog": 5}, test={decomposed: 3, "dog": 3})
    d = describe(config_of(root))
    assert d.class_names == (composed, "dog")
    assert d.counts[2] == (3, 3)


def test_labels_that_are_no_classes_are_refused_before_there_are_millions(tmp_path: Path) -> None:
    cell = io.BytesIO()
    image(0).save(cell, "PNG")
    images = pa.array([{"bytes": cell.getvalue()}] * 4)
    table = pa.table({"image": images, "label": pa.array([0, 1, 2, 2_000_000_000])})
    pq.write_table(table, tmp_path / "train-0.parquet")
    message = refused(config_of(tmp_path, "parquet"))
    assert "a label is 2000000000, and there are 4 images" in message


# --- once -----------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was decoded."""
    seen: list[bytes] = []
    real = survey_module.decode

    def counting(data: bytes, resolution: int | None) -> Any:
        seen.append(data)
        return real(data, resolution)

    monkeypatch.setattr(survey_module, "decode", counting)
    return seen


def test_every_image_is_decoded_once(tmp_path: Path, decoded: list[bytes]) -> None:
    config = config_of(plain(tmp_path / "set"))
    told: list[tuple[int, int]] = []
    describe(config, lambda done, total: told.append((done, total)))
    assert told == [(i, 20) for i in range(1, 21)]
    assert len(decoded) == 20
    load(config)
    inspect(config)
    describe(replace(config, split_seed=1), lambda done, total: told.append((done, total)))
    assert len(decoded) == 20 == len(told)


def test_images_are_decoded_by_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4)  # which only four threads at a time pass

    def waiting(data: bytes, resolution: int | None) -> Any:
        together.wait(timeout=30)
        return decode(data, resolution)

    monkeypatch.setattr(survey_module, "decode", waiting)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert sum(describe(config_of(plain(tmp_path / "set"))).sizes) == 20


def test_unreadable_images_are_listed_again_without_a_pass(
    damaged: Path, decoded: list[bytes]
) -> None:
    assert refused(config_of(damaged)) == refused(config_of(damaged))
    describe(config_of(damaged, on_unreadable="skip"))
    assert len(decoded) == 20


def test_another_resolution_decodes_before_any_work(tmp_path: Path, decoded: list[bytes]) -> None:
    config = config_of(plain(tmp_path / "set"))
    describe(config)
    describe(replace(config, resolution=4))
    assert len(decoded) == 40
    load(replace(config, resolution=4))
    assert len(decoded) == 40


def test_what_a_listing_tells_costs_no_pass(tmp_path: Path, decoded: list[bytes]) -> None:
    fill(tmp_path / "set" / "cat", 5)
    refused(config_of(tmp_path / "set"))
    assert decoded == []


def test_files_that_are_no_images_do_not_cause_another_pass(
    tmp_path: Path, decoded: list[bytes]
) -> None:
    config = config_of(plain(tmp_path / "set"))
    describe(config)
    (tmp_path / "set" / "sweep.log").write_text("a line")
    describe(config)
    assert len(decoded) == 20


def test_pass_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    config = config_of(plain(tmp_path / "set"))

    def interrupt(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        describe(config, interrupt)
    assert list((tmp_path / "cache" / "pixels").iterdir()) == []
    assert describe(config).sizes == (14, 2, 4)


# --- checks ---------------------------------------------------------------------------------


def test_one_class_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "set" / "cat", 9)
    assert "there is one class, 'cat'" in refused(config_of(tmp_path / "set"))


@pytest.mark.parametrize("part", ["valid", "test"])
def test_class_that_a_part_has_not_is_named(tmp_path: Path, part: str) -> None:
    root = lay(tmp_path / "set", train={"a": 9, "b": 9, "c": 9}, **{part: {"a": 1, "c": 1}})
    what = {"valid": "validation", "test": "test"}[part]
    assert f"the class 'b' has no image in the {what} part" in refused(config_of(root))


@pytest.mark.parametrize("count", [1, 2])
def test_class_of_too_few_images_is_named(tmp_path: Path, count: int) -> None:
    root = plain(tmp_path / "set")
    fill(root / "wolf", count)
    message = refused(config_of(root))
    assert f"'wolf' has {count} image" in message and "needs 3 or more" in message


def test_one_image_a_class_is_refused(tmp_path: Path) -> None:
    message = refused(config_of(plain(tmp_path / "set", 1)))
    assert "the classes 'cat', 'dog' have 1 image, and a class needs 3" in message


@pytest.mark.parametrize("inside", [[], ["train"], ["cat", "dog"], ["train/cat", "test/cat"]])
def test_empty_folders_are_refused(tmp_path: Path, inside: Sequence[str]) -> None:
    for name in ("set", *(f"set/{i}" for i in inside)):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    message = refused(config_of(tmp_path / "set"))
    assert str(tmp_path / "set") in message and "CLASS/picture.jpg" in message


def test_inspection_refuses_no_set_for_what_it_is(tmp_path: Path) -> None:
    fill(tmp_path / "set" / "cat", 2)
    found = inspect(config_of(tmp_path / "set", resolution=None))
    assert found.class_names == ("cat",) and found.counts == {"train": (2,)}


def test_inspection_tells_of_single_images(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", train={"a": 3, "b": 3}, test={"a": 2, "b": 2})
    Image.new("L", (30, 20)).save(root / "train" / "a" / "grey.png")
    (root / "test" / "b" / "bad.png").write_bytes(b"")
    (root / "test" / "a" / "copy.png").write_bytes((root / "train/b/001.png").read_bytes())
    Image.open(root / "train/a/001.png").save(root / "test" / "a" / "same.bmp")
    found = inspect(config_of(root, resolution=None))
    assert found.counts == {"train": (4, 3), "test": (4, 2)}
    assert len(found.sizes) == 13 and found.sizes.count((30, 20)) == 1 == found.grey
    assert found.unreadable == (Unreadable("test/b/bad.png", "empty file"),)
    assert found.duplicates == (
        ("test/a/copy.png", "train/b/001.png"),
        ("test/a/same.bmp", "train/a/001.png"),
    )


def test_inspection_of_digits() -> None:
    found = inspect(DatasetConfig(name="digits"))
    assert (len(found.sizes), found.sizes[0], found.grey) == (1797, (8, 8), 1797)
    assert [sum(c) for c in found.counts.values()] == [1347, 450]


# --- Parquet --------------------------------------------------------------------------------


def table(labels: Any, column: str = "image", struct: bool = True, first: int = 0) -> pa.Table:
    """Images with their labels: a dictionary of columns, or one column ``label``."""
    contents = []
    columns = labels if isinstance(labels, dict) else {"label": labels}
    for i in range(len(next(iter(columns.values())))):
        buffer = io.BytesIO()
        image(first + i).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    cells = [{"bytes": c, "path": None} for c in contents] if struct else contents
    return pa.table({column: cells, **columns})


def write(root: Path, **tables: pa.Table) -> DatasetConfig:
    root.mkdir(exist_ok=True)
    for part, content in tables.items():
        pq.write_table(content, root / f"{part}-00000-of-00001.parquet")
    return config_of(root, "parquet")


@pytest.mark.parametrize("val", ["validation", "valid", "val"])
def test_parts_of_parquet_are_used_as_they_are_given(tmp_path: Path, val: str) -> None:
    tables = {"train": table([0, 1] * 4), val: table([1, 0, 0], first=50), "test": table([0, 1])}
    data = load(write(tmp_path / "set", **tables))
    assert data.description.counts == ((4, 4), (2, 1), (1, 1))
    assert data.val.labels.tolist() == [1, 0, 0]


def test_validation_of_parquet_without_test_is_validation(tmp_path: Path) -> None:
    config = write(tmp_path / "set", train=table([0, 1] * 10), validation=table([0, 1], first=50))
    assert describe(config).counts == ((8, 8), (1, 1), (2, 2))
    alone = describe(replace(config, name="imagenette"))
    assert alone.counts == ((9, 9), (1, 1), (1, 1)) and alone.held_out == (0.1, None)


def test_columns_of_hugging_faces_cifar_are_found_or_named(tmp_path: Path) -> None:
    ten = write(tmp_path / "ten", train=table([0, 1] * 5, "img"))
    assert describe(ten).class_names == ("0", "1")
    labels = {"fine_label": [0, 1, 2, 3] * 4, "coarse_label": [0, 0, 1, 1] * 4}
    hundred = write(tmp_path / "hundred", train=table(labels, "img"))
    message = refused(hundred)
    assert "no column 'label' for the labels" in message
    assert "its columns are img, fine_label, coarse_label" in message
    assert "dataset.columns={label: ...}" in message
    fine, coarse = (
        describe(replace(hundred, columns={"image": "img", "label": f"{kind}_label"}))
        for kind in ("fine", "coarse")
    )
    assert (fine.classes, coarse.classes) == (4, 2)
    assert fine.fingerprint != coarse.fingerprint


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ({"label": "y"}, "no column 'y' for the labels; its columns are image, label"),
        ({"image": "label"}, "has int64 in the column 'label', and images are bytes"),
        ({"label": "image"}, "labels are whole numbers or words"),
    ],
)
def test_columns_that_do_not_do_are_refused(
    tmp_path: Path, columns: dict[str, str], rule: str
) -> None:
    config = write(tmp_path / "set", train=table([0, 1] * 5))
    assert rule in refused(replace(config, columns=columns))


def test_unknown_kind_of_column_is_refused() -> None:
    with pytest.raises(UserError, match=r"dataset\.columns names 'picture'"):
        DatasetConfig(name="parquet", root="x", columns={"picture": "img"})


def test_images_of_parquet_may_be_plain_bytes_and_labels_words(tmp_path: Path) -> None:
    words = ["wolf", "cat"] * 5
    plainly = load(write(tmp_path / "set", train=table(words, struct=False)))
    assert plainly.description.class_names == ("cat", "wolf")
    numbers = load(write(tmp_path / "other", train=table([1, 0] * 5)))
    every = torch.arange(len(plainly.train))
    assert torch.equal(plainly.train.pixels(every), numbers.train.pixels(every))
    assert torch.equal(plainly.train.labels, numbers.train.labels)


def test_labels_that_are_missing_are_refused(tmp_path: Path) -> None:
    config = write(tmp_path / "set", train=table([0, 1, None, 1] * 3))
    assert "3 rows have no label" in refused(config)


def test_skipped_rows_change_the_fingerprint_of_parquet(tmp_path: Path) -> None:
    config = write(tmp_path / "set", train=table([0, 1] * 6))
    whole = describe(config)
    path = tmp_path / "set" / "train-00000-of-00001.parquet"
    content = pq.read_table(path).to_pylist()
    content[4]["image"]["bytes"] = b"garbage"
    pq.write_table(pa.Table.from_pylist(content), path)
    assert "train-00000-of-00001.parquet, row 4 (not an image)" in refused(config)
    skipped = describe(replace(config, on_unreadable="skip"))
    assert sum(skipped.sizes) == 11 and skipped.fingerprint != whole.fingerprint


@pytest.mark.parametrize("where", ["end", "middle"])
def test_damaged_table_is_named(tmp_path: Path, where: str) -> None:
    config = write(tmp_path / "set", train=table([0, 1] * 30))
    path = tmp_path / "set" / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    if where == "end":
        del content[-100:]
    else:
        content[4:40] = bytes(36)  # the first page's header
    path.write_bytes(content)
    message = refused(config)
    assert (
        "train-00000-of-00001.parquet cannot be read (" in message and "Fetch it again" in message
    )


def test_tables_of_no_part_are_named(tmp_path: Path) -> None:
    config = write(tmp_path / "set", train=table([0, 1] * 5), unsupervised=table([0, 1]))
    assert describe(config).unused == ("unsupervised-00000-of-00001.parquet",)


def test_names_of_classes_are_those_of_the_label_column(tmp_path: Path) -> None:
    names = {"coarse_label": {"names": ["big", "small"]}}
    info = json.dumps({"info": {"features": names}})
    content = table({"coarse_label": [0, 1] * 5}).replace_schema_metadata({"huggingface": info})
    config = write(tmp_path / "set", train=content)
    found = describe(replace(config, columns={"label": "coarse_label"}))
    assert found.class_names == ("big", "small")
