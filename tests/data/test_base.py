import struct
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from ldm.data import base
from ldm.data.base import ImageFolder, list_images, make_square, open_image, to_array
from ldm.errors import UserError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def gradient(width: int = 60, height: int = 40) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, across[::-1]], axis=-1).astype(np.uint8))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), "white")
    image.paste(RED, (0, 0, 10, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    shown = open_image(tmp_path / "turned.jpg")
    assert shown.size == (40, 60)
    assert np.abs(np.asarray(shown, int)[2, 20] - RED).max() < 20
    assert np.abs(np.asarray(shown, int)[50, 20] - WHITE).max() < 20


def test_alpha_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (8, 8), (0, 128)).save(tmp_path / "half.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    assert open_image(tmp_path / "clear.png").getpixel((4, 4)) == WHITE
    assert open_image(tmp_path / "half.png").getpixel((4, 4)) == (127, 127, 127)
    assert open_image(tmp_path / "palette.png").getpixel((0, 0)) == WHITE
    assert open_image(tmp_path / "palette.png").getpixel((4, 4)) == RED


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    shown = np.asarray(open_image(tmp_path / f"deep.{suffix}"), dtype=float)
    assert np.abs(shown - (values / 257)[..., None]).max() <= 1


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    gradient().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    gradient().convert("L").save(tmp_path / "grey.jpg")
    gradient().convert("1").save(tmp_path / "bits.png")
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tif")
    shown = {path.name: open_image(path) for path in list_images(tmp_path)}
    assert {image.mode for image in shown.values()} == {"RGB"}
    assert np.abs(np.asarray(shown["cmyk.jpg"], float) - np.asarray(gradient(), float)).mean() < 3
    assert shown["float.tif"].getpixel((7, 7)) == WHITE


def test_squares_are_cropped_from_the_middle_or_squashed() -> None:
    image = Image.new("RGB", (90, 30), "white")
    image.paste(RED, (30, 0, 60, 30))
    cropped, squashed = make_square(image, 30), make_square(image, 30, center_crop=False)
    assert cropped.size == squashed.size == (30, 30)
    assert (np.asarray(cropped) == RED).all()
    assert squashed.getpixel((1, 15)) == WHITE and squashed.getpixel((15, 15)) == RED
    assert make_square(image).size == (30, 30)
    with pytest.raises(UserError, match="interpolation is 'cubic'; it must be one of linear, bilinear"):
        make_square(image, 30, "cubic")


def test_arrays_span_minus_one_to_one() -> None:
    array = to_array(Image.new("RGB", (4, 4), (0, 127, 255)))
    assert array.dtype == np.float32 and array[0, 0].tolist() == pytest.approx([-1, -1 / 255, 1])


def test_broken_files_are_reported_once_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    gradient().save(tmp_path / "b.png")
    gradient().save(tmp_path / "a.JPG")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image either")
    (tmp_path / "._a.jpg").write_text("a file manager's")
    folder = ImageFolder(tmp_path, 32)
    assert [path.name for path in folder.paths] == ["a.JPG", "b.png"]
    assert len(folder) == 2 and folder[1].shape == (32, 32, 3)
    report = capsys.readouterr().err
    assert report.count("skipped") == 2 and "c.png" in report and "d.jpg" in report
    ImageFolder(tmp_path, 32)
    assert capsys.readouterr().err == ""


def test_many_broken_files_are_counted_and_not_all_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    gradient().save(tmp_path / "whole.png")
    for number in range(12):
        (tmp_path / f"{number:02}.png").write_text("no image")
    assert len(ImageFolder(tmp_path, 32)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and "00.png cannot be read" in lines[0]
    assert lines[-1] == f"skipped: 7 more of the 13 images of {tmp_path}"


def test_subfolders_are_read_when_asked(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    gradient().save(tmp_path / "deeper" / "a.png")
    gradient().save(tmp_path / "b.png")
    assert [path.name for path in list_images(tmp_path)] == ["b.png"]
    assert [path.name for path in list_images(tmp_path, recursive=True)] == ["b.png", "a.png"]


def test_folders_without_photos_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{tmp_path.name} holds no image files"):
        ImageFolder(tmp_path)
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match="a.jpg is a file, not a folder"):
        ImageFolder(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=f"{tmp_path.name}: none of its 1 image files can be read"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="b.jpg does not exist"):
        open_image(tmp_path / "b.jpg")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient().save(tmp_path / "a.png")
    monkeypatch.setattr(base.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="a.png cannot be read"):
        open_image(tmp_path / "a.png")


def test_damaged_exif_is_a_broken_image(tmp_path: Path) -> None:
    turned, width = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI4s", 0x0100, 2, 4, b"abc")  # no number
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + width + bytes(4)
    gradient().save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(UserError, match="a.jpg cannot be read"):
        open_image(tmp_path / "a.jpg")


def test_real_photographs_are_read() -> None:
    samples = Path(skimage.__file__).parent / "data"
    names = ("astronaut.png", "retina.jpg", "camera.png", "logo.png", "no_time_for_that_tiny.gif")
    for name in names:
        square = to_array(make_square(open_image(samples / name), 64))
        assert square.shape == (64, 64, 3) and square.std() > 0.1, name
