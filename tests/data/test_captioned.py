import json
import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.data.base import Framing
from ldm.data.captioned import CaptionedFolder, ClassFolders
from ldm.data.module import DataModuleFromConfig, EpochSampler
from ldm.errors import UserError


def write_images(folder: Path, count: int, captions: bool = True) -> None:
    """Images 24 by 16, of which image i is grey 10 * i with a bright left end, and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.new("RGB", (24, 16), (10 * i,) * 3)
        image.paste("white", (0, 0, 4, 16))
        image.save(folder / f"{i:02}.png")
        if captions:
            (folder / f"{i:02}.txt").write_text(f"picture {i}\n")


def test_captions_beside_the_images(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    write_images(tmp_path / "more", 1)
    data = CaptionedFolder(str(tmp_path), size=8)
    assert [item["caption"] for item in data] == ["picture 0", "picture 1", "picture 0"]
    item = data[1]
    assert item["image"].shape == (8, 8, 3) and item["image"].dtype == np.float32 and item["index"] == 1
    assert np.allclose(item["image"][:, 2:], 10 / 127.5 - 1, atol=0.5 / 127.5)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_lists_captions_and_numbers(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, 4, captions=False)
    rows = [{"file_name": f"{i:02}.png", "text": f"row {i}", "aesthetic": 4.0 + i} for i in (3, 0, 1)]
    lines = [json.dumps(row) for row in rows]
    if name.endswith("csv"):
        lines = [",".join(rows[0]), *[",".join(map(str, row.values())) for row in rows]]
    (tmp_path / name).write_text("\n".join(lines))
    assert [item["caption"] for item in CaptionedFolder(str(tmp_path))] == ["row 3", "row 0", "row 1"]
    data = CaptionedFolder(str(tmp_path), filters={"aesthetic": {"min": 5}}, keep=["aesthetic"], table=name)
    assert [(item["caption"], float(item["aesthetic"])) for item in data] == [("row 3", 7.0), ("row 1", 5.0)]
    with pytest.raises(UserError, match="the filters leave none of 3 images"):
        CaptionedFolder(str(tmp_path), filters={"aesthetic": {"min": 9}})
    with pytest.raises(UserError, match="entry 1 names no file .column path."):
        CaptionedFolder(str(tmp_path), file_column="path")


def test_images_without_caption_are_broken_unless_one_is_given(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "01.txt").unlink()
    assert [item["caption"] for item in CaptionedFolder(str(tmp_path), caption="a thing")][1] == "a thing"
    data = CaptionedFolder(str(tmp_path))
    assert [item["caption"] for item in data] == ["picture 0", "picture 2", "picture 2"]
    assert data.broken == 1


def test_an_empty_file_is_an_empty_caption(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "00.txt").write_text(" \n")
    (tmp_path / "01.txt").unlink()
    data = CaptionedFolder(str(tmp_path), caption="a thing", max_broken=0)
    assert [item["caption"] for item in data] == ["", "a thing", "picture 2"]


def test_broken_samples_are_counted_told_and_limited(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path, 10)
    for i in (2, 3, 9):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image")
    data = CaptionedFolder(str(tmp_path), max_broken=0.3)
    shown = [item["caption"][8:] for item in data]
    assert shown == list("0144456780") and data.broken == 3
    assert [data[i]["index"] for i in (2, 3, 9)] == [4, 4, 0]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # at the first and the second
    assert "1 of 10 samples are broken (at most 3 may be)" in lines[0] and "02.png cannot be read" in lines[0]
    with pytest.raises(UserError, match=r"3 of 10 samples are broken \(at most 2 may be\); mend.*09.png") as error:
        list(CaptionedFolder(str(tmp_path), max_broken=0.2))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="1 of 10"):
        list(CaptionedFolder(str(tmp_path), max_broken=0))


def test_a_set_of_broken_samples_ends(tmp_path: Path) -> None:
    write_images(tmp_path, 3, captions=False)
    data = CaptionedFolder(str(tmp_path), max_broken=1.0)
    for _ in range(2):
        with pytest.raises(UserError, match="none of its 3 samples can be read"):
            data[0]


def test_loader_processes_count_together(tmp_path: Path) -> None:
    write_images(tmp_path, 8)
    for i in (0, 5):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image")
    section = {
        "target": "ldm.data.captioned.CaptionedFolder",
        "params": {"data_root": str(tmp_path), "max_broken": 0.25, "filters": None},
    }
    module = DataModuleFromConfig(2, train=OmegaConf.create(section), num_workers=2)
    module.setup()
    indices = [index for batch in module.train_dataloader() for index in batch["index"].tolist()]
    assert sorted(indices) == [1, 1, 2, 3, 4, 6, 6, 7]
    assert module.datasets["train"].broken == 2
    section["params"]["max_broken"] = 0.1
    module = DataModuleFromConfig(2, train=OmegaConf.create(section), num_workers=2)
    module.setup()
    with pytest.raises(UserError) as error:
        list(module.train_dataloader())
    assert re.fullmatch(r"image folder .*: 2 of 8 samples are broken .*; the last: image .*", str(error.value))


def test_fewer_samples_than_processes_are_an_error() -> None:
    assert [list(EpochSampler(3, 0, False, rank, 2)) for rank in range(2)] == [[0], [1]]
    with pytest.raises(UserError, match="1 samples cannot be divided among 2 processes"):
        EpochSampler(1, 0, world_size=2)


def test_folders_are_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "sea_lion" / "deep", 1, captions=False)
    write_images(tmp_path / "cat", 2, captions=False)
    write_images(tmp_path, 1, captions=False)  # of no class
    data = ClassFolders(str(tmp_path))
    assert [(item["caption"], item["class_label"]) for item in data] == [
        ("a photo of a cat", 0), ("a photo of a cat", 0), ("a photo of a sea lion", 1),
    ]  # fmt: skip
    names = tmp_path / "names.txt"
    names.write_text("sea_lion  steller sea lion, big one\ncat tabby\nother thing\n")
    for given in (str(names), {"sea_lion": "steller sea lion", "cat": "tabby"}):
        labelled = [item["caption"] for item in ClassFolders(str(tmp_path), given, "{}")]
        assert labelled == ["tabby", "tabby", "steller sea lion"]
    with pytest.raises(UserError, match="1 classes have no name, such as sea_lion"):
        ClassFolders(str(tmp_path), {"cat": "tabby"})
    with pytest.raises(UserError, match="names of classes .*none.txt cannot be read"):
        ClassFolders(str(tmp_path), str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="folder of classes .* holds no samples"):
        ClassFolders(str(tmp_path / "cat"))


def test_flips_and_crops_are_functions_of_seed_epoch_and_index(tmp_path: Path) -> None:
    write_images(tmp_path, 8)
    options = dict(size=16, crop="random", flip_p=0.5)
    first, again = (CaptionedFolder(str(tmp_path), seed=3, **options) for _ in range(2))
    other = CaptionedFolder(str(tmp_path), seed=4, **options)

    def epoch(data: CaptionedFolder, number: int) -> np.ndarray:
        return np.stack([data[number, i]["image"] for i in range(8)])

    later = np.stack([again[1, i]["image"] for i in reversed(range(8))])[::-1]
    assert np.array_equal(epoch(first, 1), later)
    assert np.array_equal(first[5]["image"], first[0, 5]["image"])
    assert not np.array_equal(epoch(first, 0), epoch(first, 1))
    assert not np.array_equal(epoch(first, 1), epoch(other, 1))


def test_framing_draws_evenly_and_does_what_it_says() -> None:
    image = Image.fromarray(np.tile(np.arange(48, dtype=np.uint8)[None, :, None] * 5, (16, 1, 3)))
    draws = [Framing(crop="random", flip_p=0.25).choose(epoch, i) for epoch in range(20) for i in range(100)]
    flips, places = map(np.array, zip(*draws, strict=True))
    assert abs(flips.mean() - 0.25) < 0.04 and abs(places.mean() - 0.5) < 0.03
    assert places.min() < 0.01 and places.max() > 0.99 and abs(np.corrcoef(flips, places)[0, 1]) < 0.08
    centre = Framing()(image, 0, 0)
    assert centre.shape == (16, 16, 3) and np.allclose(centre[0, :, 0], np.arange(16, 32) * 5 / 127.5 - 1)
    assert np.array_equal(Framing(flip_p=1.0)(image, 2, 7), centre[:, ::-1])
    squashed = Framing(size=12, crop="squash")(image, 0, 0)
    assert squashed.shape == (12, 12, 3) and squashed[0, 0, 0] < -0.8 and squashed[0, -1, 0] > 0.7
    starts = {round((Framing(crop="random")(image, e, 0)[0, 0, 0] + 1) * 127.5 / 5) for e in range(300)}
    assert starts == set(range(32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "corner"}, "crop is 'corner'; it must be one of center, random, squash"),
        ({"flip_p": -1}, "flip_p is -1"),
        ({"size": 0}, "size is 0"),
        ({"seed": -1}, "seed is -1; it must be a whole number"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'"),
        ({"max_broken": 5}, "max_broken is 5; it must be a share"),
        ({"table": "none.csv"}, "none.csv does not exist"),
        ({"keep": ["aesthetic"]}, "filters and keep need a table"),
        ({"data_root": "/nowhere"}, "image folder /nowhere does not exist"),
    ],
)
def test_bad_parameters_are_clear_errors(tmp_path: Path, options: dict, message: str) -> None:
    write_images(tmp_path, 1)
    with pytest.raises(UserError, match=message):
        CaptionedFolder(**{"data_root": str(tmp_path), **options})


def test_every_epoch_of_a_loader_shows_other_versions(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    params = {"data_root": str(tmp_path), "size": 16, "crop": "random"}
    section = OmegaConf.create({"target": "ldm.data.captioned.CaptionedFolder", "params": params})
    for wrap in (False, True):
        module = DataModuleFromConfig(4, train=section, validation=section, num_workers=0, wrap=wrap)
        module.setup()
        for loader, changes in ((module.train_dataloader(), True), (module.val_dataloader(), False)):
            shown = []
            for epoch in range(2):
                loader.sampler.set_epoch(epoch)
                batch = next(iter(loader))
                shown.append(batch["image"][batch["index"].argsort()].numpy())
            assert np.array_equal(*shown) is not changes
