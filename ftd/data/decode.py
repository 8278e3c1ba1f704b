"""One image file -> pixels as networks take them: upright, 8 bits a channel, R x R.

Whatever people have is made RGB: EXIF's rotation is applied, what is see-through is laid over
white, 16-bit values are scaled by 65535 and floats by 1, of an animation the first frame is
taken. What cannot be turned into pixels raises ``UnreadableError`` with the reason.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

DECODE_RULES = {False: "pil-bilinear-antialias-centre-1", True: "pil-bilinear-antialias-centre-2"}
"""Named in the fingerprint: change them when decoding or resizing changes.

The second is that of data sets with an image to which more is done than a conversion to RGB
(``Decoded.special``): before it there was one rule, which got those images wrong.
"""

WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's modes of more than 8 bits; it would clip them."""

GREY_MODES = ("1", "L", "LA", "La", *WIDE_MODES)

BITS_PER_SAMPLE = 258
"""A TIFF tag: an ``I;16`` picture of 12 bits is white at 4095."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what makes the picture upright."""

SIDEWAYS = {TURNS[k] for k in (5, 6, 7, 8)}

warnings.filterwarnings("ignore", module=r"PIL\.")  # of large photographs, odd metadata


class UnreadableError(ValueError):
    """A file that cannot be turned into pixels; the message is the reason, in a few words."""


@dataclass(frozen=True)
class Decoded:
    """An image file that could be read."""

    pixels: np.ndarray | None
    """uint8 (3, R, R); None where no resolution was asked for."""
    size: tuple[int, int]
    """Width and height of the upright picture, as stored."""
    grey: bool
    """Stored without colour."""
    special: bool
    """Turned, laid over white or scaled: more than converted to RGB."""
    digest: bytes
    """Names the decoded picture: files that differ in metadata alone have the same one."""


def decode(data: bytes, resolution: int | None) -> Decoded:
    """Decodes all of an image file. Raises UnreadableError."""
    if not data:
        raise UnreadableError("empty file")
    try:
        return _decode(Image.open(io.BytesIO(data)), resolution)
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not an image") from error
    except Exception as error:  # decoders raise whatever they stumble over
        raise UnreadableError(" ".join(str(error).split()) or type(error).__name__) from error


def _decode(picture: Image.Image, resolution: int | None) -> Decoded:
    size, drafted = picture.size, None
    if resolution is not None:  # JPEG: decode at the nearest larger size
        drafted = picture.draft("RGB", (resolution, resolution))
    picture.load()
    size = picture.size if drafted is None else size  # loading turns a TIFF upright by itself
    grey = picture.mode in GREY_MODES
    turn = TURNS.get(_orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
        size = size[::-1] if turn in SIDEWAYS else size
    wide, clear = picture.mode in WIDE_MODES, False
    if wide:
        picture = _scaled(picture)
    elif picture.has_transparency_data:
        picture, clear = _over_white(picture)
    picture = picture.convert("RGB")
    name = hashlib.sha256(repr(picture.size).encode())
    name.update(picture.tobytes())
    return Decoded(
        pixels=None if resolution is None else to_array(picture, 3, resolution),
        size=size,
        grey=grey,
        special=wide or clear or turn is not None,
        digest=name.digest(),
    )


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # metadata that are damaged leave the picture as it is
        return 1


def _over_white(picture: Image.Image) -> tuple[Image.Image, bool]:
    """The picture on a white page, and whether any of the page is seen."""
    layer = picture.convert("RGBA")
    if layer.getchannel("A").getextrema() == (255, 255):
        return picture, False
    page = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(page, layer), True


def _scaled(picture: Image.Image) -> Image.Image:
    """A picture of a wide mode with 8 bits, from black at 0 to white at the top of its range."""
    values = np.asarray(picture).astype(np.float64)
    bits = getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
    top = 1 if picture.mode == "F" else 2 ** min(bits, 16) - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # nor NaN
        raise UnreadableError(f"values from {low:g} to {high:g}, and {top} is white")
    if "transparency" in picture.info:
        values[values == picture.info["transparency"]] = top
    return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))


def to_array(picture: Image.Image | np.ndarray, channels: int, resolution: int) -> np.ndarray:
    """A picture as uint8 (C, R, R): shorter side to R, centre crop."""
    if isinstance(picture, np.ndarray):
        if picture.shape[1:] == (resolution, resolution):
            return picture
        hwc = picture.transpose(1, 2, 0)
        picture = Image.fromarray(hwc[:, :, 0] if channels == 1 else hwc)
    w, h = picture.size
    if (w, h) != (resolution, resolution):
        short = min(w, h)
        left, top = (w - short) / 2, (h - short) / 2
        picture = picture.resize(
            (resolution, resolution),
            Image.Resampling.BILINEAR,
            box=(left, top, left + short, top + short),
        )
    array = np.asarray(picture)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)
