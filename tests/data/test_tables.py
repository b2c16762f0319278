import hashlib
import importlib.util
import io
import pickle
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from ldm.data.tables import HuggingFaceImages, Rows, TorchvisionImages
from ldm.errors import UserError


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (6, 6), (value,) * 3)


def greys(data: Rows) -> list[int]:
    return [round((item["image"][0, 0, 0] + 1) * 127.5) for item in data]


def test_rows_hold_images_in_every_form(tmp_path: Path) -> None:
    file = io.BytesIO()
    grey(1).save(file, "PNG")
    grey(2).save(tmp_path / "2.png")
    images = [
        {"bytes": file.getvalue(), "path": None}, {"bytes": None, "path": str(tmp_path / "2.png")},
        grey(3), grey(4).convert("L"), np.full((6, 6), 5, np.uint8), np.full((6, 6, 3), 6, np.uint8),
    ]  # fmt: skip
    data = Rows([{"image": image, "text": f"row {i}", "score": i} for i, image in enumerate(images)], keep=["score"])
    assert greys(data) == [1, 2, 3, 4, 5, 6]
    assert [(item["caption"], item["score"]) for item in data] == [(f"row {i}", i) for i in range(6)]
    assert {item["image"].shape for item in data} == {(6, 6, 3)}


def test_broken_rows_are_skipped_and_named(capsys: pytest.CaptureFixture) -> None:
    rows = [{"image": grey(i), "text": "x"} for i in range(4)]
    rows[1]["image"], rows[2]["text"] = {"bytes": b"no image"}, None
    data = Rows(rows, "things", max_broken=0.5)
    assert greys(data) == [0, 3, 3, 3] and data.broken == 2
    told = capsys.readouterr().err
    assert "things, row 1, cannot be read" in told and "things, row 2, has no caption" in told
    with pytest.raises(UserError, match="row 1, has no image"):
        list(Rows([{"image": None, "text": "x"}, {"image": 5, "text": "x"}], max_broken=0.5))


def test_labels_become_captions() -> None:
    rows = [{"image": grey(0), "label": label} for label in (1, 0, 2, -1, None)]
    data = Rows(rows, caption_column="label", class_names=["cat", "dog"], template="the {}!", max_broken=0.6)
    assert [(item["caption"], item["class_label"]) for item in data][:2] == [("the dog!", 1), ("the cat!", 0)]
    assert data.broken == 3
    with pytest.raises(UserError, match="template is 'a photo'"):
        Rows(rows, class_names=["cat"], template="a photo")


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(UserError, match="Hugging Face data sets need a package; pip install datasets"):
            HuggingFaceImages(str(tmp_path))
        return
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = datasets.Dataset.from_dict({"image": [grey(3), grey(9)], "label": [1, 0]}, features=features)
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "set"))
    data = HuggingFaceImages(str(tmp_path / "set"), caption_column="label")
    assert greys(data) == [3, 9]
    assert [item["caption"] for item in data] == ["a photo of a dog", "a photo of a cat"]
    with pytest.raises(UserError, match="has no split test; it has train"):
        HuggingFaceImages(str(tmp_path / "set"), split="test")
    with pytest.raises(UserError, match="has no column text; it has image, label"):
        HuggingFaceImages(str(tmp_path / "set"), caption_column="text")


class StandIn(ModuleType):
    """What is used of the package `datasets`, whose folders are here Python's own dicts of lists."""

    class DatasetDict(dict):
        pass

    class Image:
        pass

    class ClassLabel:
        pass

    class Table(list):
        @property
        def features(self) -> dict[str, Any]:
            return dict.fromkeys(self[0])

    def load_from_disk(self, path: str) -> Any:
        rows = self.Table([{"image": grey(3), "caption": "three"}, {"image": grey(9), "caption": "nine"}])
        return {"rows": rows, "splits": self.DatasetDict(train=rows), "damaged": {}}[Path(path).name] or {}["rows"]


def test_what_a_hugging_face_data_set_lacks_is_told_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", StandIn("datasets"))
    for name in ("rows", "splits", "damaged"):
        (tmp_path / name).mkdir()
    assert greys(HuggingFaceImages(str(tmp_path / "rows"))) == [3, 9]
    assert greys(HuggingFaceImages(str(tmp_path / "splits"), split="train")) == [3, 9]
    for options, message in (
        ({"image_column": "img"}, "rows has no column img; it has image, caption"),
        ({"caption_column": "label"}, "rows has no column label; it has image, caption"),
        ({"keep": ["score"]}, "rows has no column score; it has image, caption"),
    ):
        with pytest.raises(UserError, match=message):
            HuggingFaceImages(str(tmp_path / "rows"), **options)
    with pytest.raises(UserError, match="splits has no split test; it has train"):
        HuggingFaceImages(str(tmp_path / "splits"), split="test")
    with pytest.raises(UserError, match="damaged cannot be loaded: 'rows'"):
        HuggingFaceImages(str(tmp_path / "damaged"))


def test_mnist_from_disk(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28)
        images = struct.pack(">4i", 0x803, count, 28, 28) + pixels.tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes([7, 0, 9][:count]))
    data = TorchvisionImages("MNIST", str(tmp_path), size=32, template="the digit {}")
    assert [(item["caption"], item["class_label"]) for item in data] == [
        ("the digit seven", 7), ("the digit zero", 0), ("the digit nine", 9),
    ]  # fmt: skip
    assert greys(data) == [0, 1, 2] and data[0]["image"].shape == (32, 32, 3)
    assert len(TorchvisionImages("MNIST", str(tmp_path), train=False)) == 2
    (raw / "train-images-idx3-ubyte").write_bytes(bytes(100))
    with pytest.raises(UserError, match="MNIST is not in .* or damaged .*fetch it"):
        TorchvisionImages("MNIST", str(tmp_path))


def test_cifar_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.repeat(np.array([[4], [200]], np.uint8), 3072, axis=1)
    files = {
        "data_batch_1": {"data": pixels, "labels": [2, 0]},
        "batches.meta": {"label_names": ["airplane", "automobile", "bird"]},
    }
    sums = {}
    for name, contents in files.items():
        (folder / name).write_bytes(pickle.dumps(contents))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    known = torchvision.datasets.CIFAR10  # knows the real files by their sums
    monkeypatch.setattr(known, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(known, "test_list", [])
    monkeypatch.setattr(known, "meta", {**known.meta, "md5": sums["batches.meta"]})
    data = TorchvisionImages("CIFAR10", str(tmp_path))
    assert [item["caption"] for item in data] == ["a photo of a bird", "a photo of a airplane"]
    assert greys(data) == [4, 200]


def test_collections_that_are_not_there_are_clear_errors(tmp_path: Path) -> None:
    for name in TorchvisionImages.COLLECTIONS:
        with pytest.raises(UserError, match=f"{name} is not in .* fetch it with python -c"):
            TorchvisionImages(name, str(tmp_path))
    with pytest.raises(UserError, match="name is 'SVHN'; it must be one of MNIST"):
        TorchvisionImages("SVHN", str(tmp_path))
