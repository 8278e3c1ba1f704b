"""A contact sheet: the pictures of several sets below each other, each with its caption."""

import io
import re
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ftd_ray.pictures.places import value_text
from ftd_ray.search import Ended

MAX_PIXELS = 4_000_000
MOST_SETS = 20
"""Sets on a sheet; of more, the first ones are shown and the rest are counted."""
NARROWEST, WIDEST = 640, 1400
"""Pixels of the sheet's width: room for a caption, and as much as a screen shows."""
MARGIN, TEXT = 16, 17


def caption(trial: Ended, names: dict[str, str]) -> str:
    """``trial 9 · 93.0 % · rho 0.05, syn_steps 20``; ``names`` as by ``short_names``."""
    score = [] if trial.value is None else [f"{100 * trial.value:.1f} %"]
    point = ", ".join(f"{names.get(k, k)} {value_text(v)}" for k, v in trial.params.items())
    return " · ".join([f"trial {trial.number}", *score, *([point] if point else [])])


def contact_sheet(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """A PNG file of at most ``MAX_PIXELS`` from captions and PNG files of sets.

    All sets are scaled alike, so that an image has the same size in each.
    """
    pictures = [Image.open(io.BytesIO(data)) for _, data in entries[:MOST_SETS]]
    texts = [text for text, _ in entries[:MOST_SETS]]
    left = len(entries) - len(pictures)
    more = [f"and {left} more"] if left else []
    room = max((p.width for p in pictures), default=0)
    scale = min(1.0, (WIDEST - 2 * MARGIN) / max(1, room))
    while True:
        width = max(NARROWEST, round(room * scale) + 2 * MARGIN)
        font = _font()
        per_line = int((width - 2 * MARGIN) / font.getlength("n"))
        blocks = [_lines(t, per_line) for t in texts]
        tail = textwrap.wrap(more[0], per_line) if more else []
        sizes = [
            (max(1, round(p.width * scale)), max(1, round(p.height * scale))) for p in pictures
        ]
        line = round(1.35 * TEXT)
        heights = [len(b) * line + 6 + h + MARGIN for b, (_, h) in zip(blocks, sizes, strict=True)]
        height = MARGIN + sum(heights) + len(tail) * line + (MARGIN if tail else 0)
        if width * height <= MAX_PIXELS:
            break
        scale *= 0.9
    sheet = Image.new("RGB", (width, max(height, 2 * MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    y = MARGIN
    for picture, block, size, tall in zip(pictures, blocks, sizes, heights, strict=True):
        for k, text in enumerate(block):
            draw.text((MARGIN, y + k * line), text, fill="black", font=font)
        small = picture.convert("RGB")
        if size != small.size:
            small = small.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(small, (MARGIN, y + len(block) * line + 6))
        y += tall
    for k, text in enumerate(tail):
        draw.text((MARGIN, y + k * line), text, fill="dimgray", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _lines(text: str, width: int) -> list[str]:
    """At most three lines, broken after commas and dots: a name stays with its value."""
    tied = re.sub(r"(?<![,·]) (?!·)", "\N{NO-BREAK SPACE}", text)
    return textwrap.wrap(tied, width, max_lines=3, placeholder=" …")


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings: it has Greek letters, and is the same everywhere."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), TEXT)
