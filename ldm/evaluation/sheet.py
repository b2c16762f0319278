"""A sheet of pictures in labelled rows, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

INK, GREY, RULE = (32, 33, 36), (110, 114, 120), (218, 220, 224)
TILE, GAP, MARGIN, LABEL, LINE = 144, 12, 28, 176, 17


@dataclass(frozen=True)
class Row:
    """Pictures side by side.

    Args:
        title, subtitle: what is written left of them.
        captions: one below each picture, or none.
        gap: whether a rule and some space follow.
    """

    title: str
    subtitle: str
    pictures: Sequence[Image.Image]
    captions: Sequence[str] = field(default_factory=tuple)
    gap: bool = False


def wrap(draw: ImageDraw.ImageDraw, text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """`text` in lines at most `width` pixels wide, broken at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_sheet(rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> Image.Image:
    """The rows under a title, with notes at the bottom."""
    big, bold, small = (ImageFont.load_default(size=size) for size in (24, 17, 13))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    captions = [[wrap(measure, text, TILE, small) for text in row.captions[: len(row.pictures)]] for row in rows]
    heights = [
        TILE + GAP + LINE * max(map(len, lines), default=0) + (28 if row.gap else 0)
        for row, lines in zip(rows, captions, strict=True)
    ]
    width = 2 * MARGIN + LABEL + max(len(row.pictures) for row in rows) * (TILE + GAP) - GAP
    top = MARGIN + 48
    sheet = Image.new("RGB", (width, top + sum(heights) + LINE * len(notes) + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=big)
    y = top
    for row, lines, height in zip(rows, captions, heights, strict=True):
        draw.text((MARGIN, y + TILE // 2 - 22), row.title, fill=INK, font=bold)
        draw.text((MARGIN, y + TILE // 2 + 2), row.subtitle, fill=GREY, font=small)
        for column, picture in enumerate(row.pictures):
            x = MARGIN + LABEL + column * (TILE + GAP)
            sheet.paste(picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))
            draw.rectangle([x - 1, y - 1, x + TILE, y + TILE], outline=RULE)
            for i, line in enumerate(lines[column] if lines else []):
                middle = x + (TILE - draw.textlength(line, font=small)) / 2
                draw.text((middle, y + TILE + 5 + i * LINE), line, fill=GREY, font=small)
        if row.gap:
            draw.line([MARGIN, y + height - 14, width - MARGIN, y + height - 14], fill=RULE)
        y += height
    draw.line([MARGIN, y + 8, width - MARGIN, y + 8], fill=RULE)
    for i, note in enumerate(notes):
        draw.text((MARGIN, y + 20 + i * LINE), note, fill=GREY, font=small)
    return sheet
