import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.shards import Shards, find_shards, read_shard
from ldm.errors import UserError


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return path


def sample(number: int, **fields: object) -> dict[str, bytes]:
    fields = {"caption": f"picture {number}", "aesthetic": number, **fields}
    return {f"{number:04}.png": png(number), f"{number:04}.json": json.dumps(fields).encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shard(tmp_path / "b.tar", sample(7) | sample(3))
    write_shard(tmp_path / "a.tar", sample(5) | sample(6, aesthetic=None) | sample(1))
    return tmp_path


def test_samples_come_in_the_order_of_the_shards(folder: Path) -> None:
    data = Shards(str(folder))
    assert [item["caption"] for item in data] == [f"picture {i}" for i in (5, 6, 1, 7, 3)]
    for i, grey in enumerate((5, 6, 1, 7, 3)):
        assert data[i]["image"].shape == (8, 8, 3) and np.allclose(data[i]["image"], grey / 127.5 - 1)
    assert [item["caption"] for item in Shards([str(folder / "b.*"), str(folder / "a.tar")])][:2] == [
        "picture 7", "picture 3",
    ]  # fmt: skip


def test_filters_and_kept_fields(folder: Path) -> None:
    data = Shards(str(folder), filters={"aesthetic": {"min": 3, "max": 6}}, keep=["aesthetic"])
    assert [(item["caption"], item["aesthetic"]) for item in data] == [("picture 5", 5), ("picture 3", 3)]
    with pytest.raises(UserError, match="the filters leave none of 5 images"):
        Shards(str(folder), filters={"aesthetic": {"min": 8}})
    assert [set(sample.fields) for sample in Shards(str(folder)).samples] == [{"caption"}] * 5  # no more in memory
    kept = Shards(str(folder), keep=["aesthetic"], max_broken=0.2)
    assert [item["aesthetic"] for item in kept] == [5, 1, 1, 7, 3] and kept.broken == 1


def test_files_of_one_name_are_one_sample(tmp_path: Path) -> None:
    files = {
        "x/1.txt": b"from  the\ntext", "y/1.png": png(2), "x/1.PNG": png(1), "y/1.txt": b"another",
        "x/2.png": png(3), "x/2.txt": b"plain", "x/2.json": b'{"caption": "", "width": 8}',
        "x/3.seg.png": png(9), "x/4.txt": b"no image", "x/._2.png": b"of a Mac", "x/5.png": png(4), "x/5.txt": b"",
    }  # fmt: skip
    write_shard(tmp_path / "s.tar", files)
    data = Shards(str(tmp_path / "s.tar"))
    assert [item["caption"] for item in data] == ["from the text", "another", "plain", ""]
    assert [round((item["image"][0, 0, 0] + 1) * 127.5) for item in data] == [1, 2, 3, 4]


def test_broken_samples_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = sample(1) | sample(2) | {"0003.png": png(3), "0003.json": b"{"} | sample(4)
    files["0002.png"] = files["0002.png"][:40]
    data = Shards(str(write_shard(tmp_path / "s.tar", files)), max_broken=0.5)
    assert [item["caption"] for item in data] == ["picture 1", "picture 4", "picture 4", "picture 4"]
    assert data.broken == 2 and "s.tar:0002.png cannot be read" in capsys.readouterr().err
    with pytest.raises(UserError, match="s.tar:0003.png has no caption"):
        list(Shards(str(tmp_path), max_broken=0.25))


def test_unusable_shards_are_clear_errors(folder: Path) -> None:
    for entry in (folder / "c.tar", folder / "*.tgz"):
        with pytest.raises(UserError, match="there are no such .tar files"):
            find_shards(str(entry))
    whole = (folder / "a.tar").read_bytes()
    changed = whole[:1024] + b"?" + whole[1025:]  # the second file's header
    for name, contents in (
        ("cut.tar", whole[:1700]), ("text.tar", b"hello " * 200), ("empty.tar", b""), ("changed.tar", changed)
    ):  # fmt: skip
        (folder / name).write_bytes(contents)
        with pytest.raises(UserError, match=f"{name} is cut off or no plain .tar file"):
            read_shard(folder / name)
    write_shard(folder / "packed.tar", sample(1), "w:gz")
    with pytest.raises(UserError, match="packed.tar is cut off or no plain"):
        read_shard(folder / "packed.tar")
