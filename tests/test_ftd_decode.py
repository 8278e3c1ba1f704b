"""Every kind of image file that people have, as pixels; and those that are none."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftd.data.decode import DECODE_RULES, Decoded, UnreadableError, decode

SIDE = 8


def file_of(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """The mean colour, (3,), of a file that is decoded to 8 x 8."""
    found = decode(data, SIDE).pixels
    assert found is not None and found.shape == (3, SIDE, SIDE) and found.dtype == np.uint8
    return found.reshape(3, -1).mean(1)


def halves(width: int = 40, height: int = 40) -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (width, height), "blue")
    picture.paste("red", (0, 0, width // 2, height))
    return picture


def sides(data: bytes) -> dict[str, str]:
    """The colour of each side of a decoded picture, where it has one."""
    found = decode(data, SIDE)
    assert found.pixels is not None
    image = found.pixels.astype(float)
    strips = {
        "left": image[:, :, :3],
        "right": image[:, :, -3:],
        "top": image[:, :3],
        "bottom": image[:, -3:],
    }
    colours = {name: strip.reshape(3, -1).mean(1) for name, strip in strips.items()}
    near = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    return {
        name: colour
        for name, mean in colours.items()
        for colour, wanted in near.items()
        if np.abs(mean - wanted).max() < 30
    }


def png_of(values: np.ndarray, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A 16-bit PNG by hand: ``values`` (H, W, C), ``colour`` 0 grey, 2 RGB, 4 LA, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks)]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_of(data: bytes, bits: int, width: int = 8, height: int = 8, **tags: int) -> bytes:
    """An uncompressed grey TIFF by hand; ``tags`` as in t339=3."""
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height}
    entries |= {279: len(data)} | {int(k[1:]): v for k, v in tags.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    out = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    for tag, value in sorted(entries.items()):
        out += struct.pack("<HHII", tag, 4, 1, value)
    return out + struct.pack("<I", 0) + data


# --- ordinary images ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_lossless_files_keep_their_pixels(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode(file_of(Image.fromarray(values), kind, **options), SIDE)
    assert found.pixels is not None
    np.testing.assert_array_equal(found.pixels, values.transpose(2, 0, 1))
    assert (found.size, found.grey, found.special) == ((SIDE, SIDE), False, False)


def test_jpeg_is_near_its_pixels() -> None:
    np.testing.assert_allclose(
        pixels(file_of(Image.new("RGB", (64, 48), (200, 100, 50)), "JPEG")), [200, 100, 50], atol=3
    )


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_is_three_equal_channels(mode: str) -> None:
    found = decode(file_of(Image.new("L", (9, 9), 255).convert(mode), "PNG"), SIDE)
    assert found.pixels is not None and (found.pixels == 255).all()
    assert found.grey and not found.special


def test_palette_shows_its_colours() -> None:
    picture = Image.new("RGB", (9, 9), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert picture.mode == "P"
    found = decode(file_of(picture, "PNG"), SIDE)
    np.testing.assert_allclose(pixels(file_of(picture, "PNG")), [10, 200, 30], atol=1)
    assert not found.grey and not found.special


def test_middle_of_a_wide_picture_is_taken() -> None:
    wide = Image.new("RGB", (3 * SIDE, SIDE), "red")
    wide.paste("blue", (SIDE, 0, 2 * SIDE, SIDE))
    np.testing.assert_array_equal(pixels(file_of(wide, "PNG")), [0, 0, 255])
    assert decode(file_of(wide, "PNG"), None).size == (3 * SIDE, SIDE)


# --- transparency ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_hidden_colour_is_not_shown(kind: str) -> None:
    picture = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = file_of(picture, kind, **options)
    np.testing.assert_array_equal(pixels(data), [255, 255, 255])
    assert decode(data, SIDE).special


def test_half_transparent_is_half_white() -> None:
    half = file_of(Image.new("RGBA", (9, 9), (255, 0, 0, 128)), "PNG")
    np.testing.assert_allclose(pixels(half), [255, 127, 127], atol=1)


def test_opaque_alpha_changes_nothing() -> None:
    data = file_of(Image.new("RGBA", (9, 9), (9, 80, 7, 255)), "PNG")
    np.testing.assert_array_equal(pixels(data), [9, 80, 7])
    assert not decode(data, SIDE).special


def test_grey_with_alpha_is_laid_over_white() -> None:
    found = decode(file_of(Image.new("LA", (9, 9), (0, 0)), "PNG"), SIDE)
    assert found.pixels is not None and (found.pixels == 255).all() and found.grey


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_colour_of_a_palette_is_white(kind: str) -> None:
    picture = Image.new("P", (9, 9), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    np.testing.assert_array_equal(pixels(file_of(picture, kind, transparency=1)), [255, 255, 255])
    np.testing.assert_array_equal(pixels(file_of(picture, kind)), [255, 0, 0])


@pytest.mark.parametrize(("mode", "key", "colour"), [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3))])
def test_transparent_colour_without_a_palette_is_white(mode: str, key: Any, colour: Any) -> None:
    data = file_of(Image.new(mode, (9, 9), colour), "PNG", transparency=key)
    np.testing.assert_array_equal(pixels(data), [255, 255, 255])


# --- more than 8 bits -----------------------------------------------------------------------


def grey_png(value: int) -> bytes:
    return png_of(np.full((9, 9, 1), value), 0)


def grey_tiff(value: int) -> bytes:
    return file_of(Image.fromarray(np.full((9, 9), value, np.uint16)), "TIFF")


def grey_big_endian_tiff(value: int) -> bytes:
    picture = Image.fromarray(np.full((9, 9), value, ">u2"))
    assert picture.mode == "I;16B"
    return file_of(picture, "TIFF")


def grey_pgm(value: int) -> bytes:
    return b"P5 9 9 65535\n" + np.full(81, value, ">u2").tobytes()


def wide_tiff(value: int) -> bytes:
    return file_of(Image.fromarray(np.full((9, 9), value, np.int32)), "TIFF")


def rgb_png(value: int) -> bytes:
    return png_of(np.full((9, 9, 3), value), 2)


def float_tiff(value: int) -> bytes:
    return file_of(Image.fromarray(np.full((9, 9), value / 65535, np.float32)), "TIFF")


DEEP: list[Callable[[int], bytes]] = [
    grey_png,
    grey_tiff,
    grey_big_endian_tiff,
    grey_pgm,
    wide_tiff,
    rgb_png,
    float_tiff,
]


@pytest.mark.parametrize("make", DEEP)
@pytest.mark.parametrize(("value", "wanted"), [(0, 0), (32896, 128), (65535, 255)])
def test_sixteen_bits_keep_white_grey_and_black(
    make: Callable[[int], bytes], value: int, wanted: int
) -> None:
    np.testing.assert_array_equal(pixels(make(value)), [wanted] * 3)


def test_sixteen_bits_keep_their_differences() -> None:
    ramp = np.linspace(0, 65535, SIDE).round().astype(np.uint16)
    data = png_of(np.tile(ramp, (SIDE, 1))[:, :, None], 0)
    found = decode(data, SIDE)
    assert found.pixels is not None and found.special and found.grey
    np.testing.assert_array_equal(found.pixels[0, 0], np.round(ramp / 257))


def test_twelve_bits_are_white_at_4095() -> None:
    packed = bytes([0xFF, 0xFF, 0xFF]) * 32  # two values of 12 bits in three bytes
    np.testing.assert_array_equal(pixels(tiff_of(packed, 12)), [255, 255, 255])
    packed = bytes([0x80, 0x08, 0x00]) * 32
    np.testing.assert_allclose(pixels(tiff_of(packed, 12)), [127.5] * 3, atol=1)


def test_sixteen_bits_with_alpha_are_laid_over_white() -> None:
    clear = np.zeros((9, 9, 4), int)
    np.testing.assert_array_equal(pixels(png_of(clear, 6)), [255, 255, 255])
    np.testing.assert_array_equal(pixels(png_of(clear[:, :, :2], 4)), [255, 255, 255])


def test_transparent_grey_of_sixteen_bits_is_white() -> None:
    data = png_of(np.full((9, 9, 1), 300), 0, (b"tRNS", struct.pack(">H", 300)))
    np.testing.assert_array_equal(pixels(data), [255, 255, 255])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((9, 9), 70_000, np.int32), "values from 70000 to 70000, and 65535 is white"),
        (np.full((9, 9), -1, np.int32), "values from -1 to -1"),
        (np.full((9, 9), 200, np.float32), "values from 200 to 200, and 1 is white"),
        (np.full((9, 9), np.nan, np.float32), "values from nan"),
    ],
)
def test_values_whose_white_is_unknown_are_not_guessed(values: np.ndarray, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        decode(file_of(Image.fromarray(values), "TIFF"), SIDE)


# --- CMYK -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_shows_its_colours(kind: str) -> None:
    """Pillow writes CMYK JPEGs inverted, with Adobe's marker, as Photoshop does."""
    data = file_of(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), kind)
    assert kind == "TIFF" or b"Adobe" in data
    np.testing.assert_allclose(pixels(data), [255, 0, 0], atol=3)
    white = file_of(Image.new("CMYK", (32, 32), (0, 0, 0, 0)), kind)
    np.testing.assert_allclose(pixels(white), [255, 255, 255], atol=3)


# --- EXIF -----------------------------------------------------------------------------------

LEFT_GOES = {
    1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom",
}  # fmt: skip
"""EXIF's orientation -> where the left side of the stored picture belongs."""


def turned(orientation: int, kind: str, size: tuple[int, int] = (40, 40)) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(halves(*size), kind, exif=exif)


@pytest.mark.parametrize("orientation", LEFT_GOES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_exif_says(orientation: int, kind: str) -> None:
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    red = LEFT_GOES[orientation]
    assert sides(turned(orientation, kind)) == {red: "red", opposite[red]: "blue"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_size_is_that_of_the_upright_picture(kind: str) -> None:
    for resolution in (None, SIDE):  # JPEG decodes at a smaller size
        assert decode(turned(6, kind, (90, 40)), resolution).size == (40, 90)
        assert decode(turned(3, kind, (90, 40)), resolution).size == (90, 40)


def test_large_jpeg_is_decoded_small_and_turned() -> None:
    assert sides(turned(8, "JPEG", (1600, 1600))) == {"bottom": "red", "top": "blue"}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_leave_a_picture_as_it_is() -> None:
    data = file_of(halves(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert sides(data) == {"left": "red", "right": "blue"}


# --- several pictures in a file -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_of_several_frames_is_taken(kind: str) -> None:
    first, second = (Image.new("RGB", (20, 20), c) for c in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(first, kind, save_all=True, append_images=[second], **options)
    np.testing.assert_allclose(pixels(data), [255, 0, 0], atol=1)


# --- what cannot be read --------------------------------------------------------------------


def noisy(kind: str, **options: Any) -> bytes:
    values = np.random.default_rng(1).integers(0, 256, (90, 90, 3), np.uint8)
    return file_of(Image.fromarray(values), kind, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("resolution", [None, SIDE])
def test_truncated_file_is_unreadable(kind: str, resolution: int | None) -> None:
    data = noisy(kind)
    decode(data, resolution)
    with pytest.raises(UnreadableError) as caught:
        decode(data[: len(data) * 2 // 3], resolution)
    assert "0x" not in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_progressive_jpeg_is_unreadable() -> None:
    data = noisy("JPEG", progressive=True)
    with pytest.raises(UnreadableError, match="truncated"):
        decode(data[: len(data) * 2 // 3], SIDE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty file"), (b"not an image at all", "not an image"), (b"\xff\xd8\xff", "not an")],
)
def test_what_is_no_image_says_so(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        decode(data, SIDE)


def test_large_photograph_is_read_without_a_warning() -> None:
    code = (
        "import io; from PIL import Image; from ftd.data.decode import decode;"
        "b = io.BytesIO(); Image.new('1', (9, 9)).save(b, 'PNG');"
        "Image.MAX_IMAGE_PIXELS = 50;"  # above it Pillow warns, above its double it refuses
        "print(decode(b.getvalue(), 8).size)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("(9, 9)\n", "")


def test_picture_too_large_for_memory_is_unreadable() -> None:
    small = file_of(Image.new("1", (8, 8)), "PNG")
    header = small[12:16] + struct.pack(">II", 60_000, 60_000) + small[24:29]
    data = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(UnreadableError, match="3600000000 pixels"):
        decode(data, SIDE)


# --- what is kept of it ---------------------------------------------------------------------


def test_ordinary_and_special_images_are_decoded_by_rules_of_two_names() -> None:
    """Sets of ordinary images keep their fingerprints, the others cannot."""
    assert DECODE_RULES[False] == "pil-bilinear-antialias-centre-1" != DECODE_RULES[True]


def test_digest_names_the_picture_not_the_file() -> None:
    def digest(data: bytes) -> bytes:
        found: Decoded = decode(data, SIDE)
        return found.digest

    plain = noisy("PNG")
    assert digest(plain) == digest(noisy("PNG", compress_level=1)) == digest(noisy("BMP"))
    assert digest(plain) != digest(file_of(halves(90, 90), "PNG"))
