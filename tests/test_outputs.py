"""Settings in PNG files, read back by the rules of AUTOMATIC1111's web UI, and the names of files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.errors import UserError
from ldm.outputs import OutputFolder, Picture, Settings, grid_of

# "name: value" pairs: a name begins with a letter or digit; a value is in quotes (JSON's) or goes to the next comma.
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read(text: str) -> tuple[str, str, dict[str, str]]:
    """(prompt, negative prompt, settings): the last line holds the settings, a marked one begins the negative."""
    *lines, last = text.strip().split("\n")
    parts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in lines:
        if line.startswith("Negative prompt:"):
            negative, line = True, line.removeprefix("Negative prompt:").strip()
        parts[negative].append(line)
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in PAIR.findall(last)}
    return "\n".join(parts[False]), "\n".join(parts[True]), values


def settings(**changes: object) -> Settings:
    usual = dict(prompt="a cat", negative_prompt="", seed=7, steps=20, sampler="DPM++ 2M", scale=7.5, eta=None)
    return Settings(**usual | dict(height=512, width=768) | changes)


def test_the_plain_form() -> None:
    text = settings(negative_prompt="blur, text", model="sd-v1-4").parameters()
    assert text == (
        "a cat\nNegative prompt: blur, text\n"
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 768x512, Model: sd-v1-4"
    )


LINES = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=40).map(str.strip)
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=20).map(str.strip)


@given(
    prompt=LINES.filter(lambda line: not line.startswith("Negative prompt:")),
    negative_prompt=LINES,
    model=NAMES,
    adapter=NAMES,
    strength=st.none() | st.floats(0.01, 1.0),
    clip_skip=st.none() | st.integers(1, 12),
)
def test_everything_is_read_back(
    prompt: str, negative_prompt: str, model: str, adapter: str, strength: float | None, clip_skip: int | None
) -> None:
    made = settings(
        prompt=prompt,
        negative_prompt=negative_prompt,
        model=model,
        adapter=adapter,
        strength=strength,
        clip_skip=clip_skip,
    )
    read_prompt, read_negative, values = read(made.parameters())
    assert (read_prompt, read_negative) == (prompt, negative_prompt)
    assert values["Steps"] == "20" and values["Seed"] == "7" and values["Size"] == "768x512"
    assert values["Sampler"] == "DPM++ 2M" and float(values["CFG scale"]) == 7.5
    assert values.get("Model", "") == model and values.get("Adapter", "") == adapter
    assert values.get("Clip skip") == (None if clip_skip is None else str(clip_skip))
    assert float(values.get("Denoising strength", 0)) == pytest.approx(strength or 0, rel=1e-5)


def test_brackets_are_marked_as_text_or_weights() -> None:
    """The web UI takes brackets for weights, unless Emphasis says otherwise."""
    assert "Emphasis" not in read(settings().parameters())[2]
    assert read(settings(prompt="a (cat:1.2)").parameters())[2]["Emphasis"] == "None"
    weighted = settings(prompt="a (cat:1.2)", prompt_weighting=True)
    assert read(weighted.parameters())[2]["Emphasis"] == "No norm"


def test_a_file_keeps_any_text(tmp_path: Path) -> None:
    made = settings(prompt="ein Hünd 🐕, 日本", negative_prompt="x: y", model='odd, "name"')
    Picture(Image.new("RGB", (8, 8), "red"), made).save(tmp_path / "picture.png")
    again = Image.open(tmp_path / "picture.png")
    assert again.getpixel((3, 3)) == (255, 0, 0)
    assert again.info["parameters"] == made.parameters()
    assert read(again.info["parameters"])[2]["Model"] == 'odd, "name"'
    assert settings(prompt="bytes \udc80").parameters().startswith("bytes ?\n")  # of a command line, no text


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/picture.png' cannot be written"):
        Picture(Image.new("RGB", (8, 8)), settings()).save(tmp_path / "file" / "picture.png")


def test_numbers_go_on_after_the_largest(tmp_path: Path) -> None:
    folder, picture = OutputFolder(tmp_path), Picture(Image.new("RGB", (8, 8)), settings())
    assert folder.save(picture).relative_to(tmp_path) == Path("samples/00000.png")
    (tmp_path / "samples" / "00041.png").touch()
    (tmp_path / "samples" / "notes.txt").touch()
    assert folder.save(picture).name == "00042.png"
    assert folder.save_grid([picture] * 3, 2, lambda image: image).name == "grid-0000.png"
    assert folder.save_grid([picture], 2, lambda image: image).name == "grid-0001.png"


def test_a_grid_goes_row_by_row() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    sheet = grid_of([red, red, blue], columns=2)
    assert sheet.size == (2 * 10 + 2, 2 * 10 + 2)
    assert [sheet.getpixel(at) for at in ((5, 5), (15, 5), (5, 15), (15, 15))] == [
        (255, 0, 0),
        (255, 0, 0),
        (0, 0, 255),
        (0, 0, 0),
    ]
