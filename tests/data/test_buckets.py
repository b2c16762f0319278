import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from ldm.data.base import fit, image_size, open_image
from ldm.data.buckets import Buckets, BucketSampler
from ldm.data.captioned import CaptionedFolder, ClassFolders
from ldm.data.module import DataModuleFromConfig, WrappedDataset
from ldm.data.shards import Shards
from ldm.data.tables import Rows
from ldm.errors import UserError


def test_sizes_are_steps_within_the_budget() -> None:
    sizes = Buckets(512).sizes
    assert {(512, 512), (256, 1024), (320, 768), (384, 640), (640, 384)} <= set(sizes) and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % 64 == height % 64 == 0 and width * height <= 512**2 and (height, width) in sizes
        assert 256 <= min(width, height) and max(width, height) <= 1024
        assert (min(width, height) + 64) * max(width, height) > 512**2  # no smaller than it need be
    assert set(Buckets(64, step=32, max_side=96).sizes) == {(32, 96), (64, 64), (96, 32)}


def test_a_picture_goes_where_its_aspect_is_nearest() -> None:
    buckets = Buckets(512)
    sizes = np.array([[1000, 1000], [1600, 900], [900, 1600], [60, 300], [512, 520]])
    chosen = [buckets.sizes[number] for number in buckets.nearest(sizes)]
    assert chosen == [(512, 512), (640, 384), (384, 640), (256, 1024), (512, 512)]
    for (width, height), own in zip(sizes, chosen, strict=True):
        off = abs(np.log(width / height * own[1] / own[0]))
        assert all(off <= abs(np.log(width / height * b / a)) + 1e-6 for a, b in buckets.sizes)


def test_a_picture_keeps_its_aspect_and_all_but_what_sticks_out() -> None:
    across, down = np.meshgrid(np.arange(90), np.arange(40))
    image = Image.fromarray(np.stack([across, down, down], -1).astype(np.uint8))
    for place, first in ((0.0, 0), (0.5, 5), (1.0, 10)):
        shown = np.asarray(fit(image, (80, 40), place=place))
        assert shown.shape == (40, 80, 3) and np.array_equal(shown[:, :, 0], across[:, first : first + 80])
    small = np.asarray(fit(image, (20, 20)), float)  # half as large, in both directions
    assert abs(np.diff(small[10, 4:-4, 0]).mean() - 2) < 0.05 and abs(np.diff(small[4:-4, 10, 1]).mean() - 2) < 0.05


def test_the_header_tells_the_size_as_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    for orientation in (1, 3, 6, 8):
        exif[0x0112] = orientation
        Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
        assert image_size(tmp_path / "turned.jpg") == open_image(tmp_path / "turned.jpg").size
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match="text.jpg cannot be read"):
        image_size(tmp_path / "text.jpg")


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    batch_size=st.integers(1, 4),
    world=st.integers(1, 3),
    skip=st.integers(0, 5),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_batches_are_of_one_bucket_and_no_sample_comes_twice(
    counts: list[int], batch_size: int, world: int, skip: int, drop_last: bool, data: st.DataObject
) -> None:
    bucket_of = np.repeat([-1, *range(len(counts))], [2, *counts])
    bucket_of = bucket_of[data.draw(st.permutations(range(len(bucket_of))))]
    if sum(count // world for count in counts) == 0:
        with pytest.raises(UserError, match="no bucket holds"):
            BucketSampler(bucket_of, batch_size, 3, True, 0, world)
        return

    def sampler_of(rank: int, skip: int = 0) -> BucketSampler:
        return BucketSampler(bucket_of, batch_size, 3, True, rank, world, skip, False, drop_last)

    def epoch(number: int, skip: int = 0) -> list[list[list[int]]]:
        """Of every process its batches."""
        samplers = [
            BucketSampler(bucket_of, batch_size, 3, True, r, world, skip, False, drop_last) for r in range(world)
        ]
        for sampler in samplers:
            sampler.sampler.set_epoch(number)
        return [list(sampler) for sampler in samplers]

    shown = epoch(1)
    assert shown == epoch(1) and epoch(1, skip) == [batches[skip:] for batches in shown]
    everything = [index for batches in shown for batch in batches for index in batch]
    assert len(everything) == len(set(everything)) and -1 not in bucket_of[everything]
    full = sum(count // (batch_size * world) for count in counts)
    for batches in zip(*shown, strict=True):
        assert len({int(bucket_of[index]) for batch in batches for index in batch}) == 1
        assert len({len(batch) for batch in batches}) == 1 and 0 < len(batches[0]) <= batch_size
        assert len(batches[0]) == batch_size or not (drop_last and full)
    sampler = sampler_of(0)
    assert len(sampler) == len(shown[0])
    if not drop_last:
        assert len(everything) == sum(count // world * world for count in counts)
    elif full:
        assert len(everything) == full * batch_size * world
        assert f"leaves out {sum(counts) - len(everything)} pictures" in sampler.summary()


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> None:
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (10 * i,) * 3).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture {i}")


SIZES = [(64, 64)] * 5 + [(90, 30)] * 4 + [(30, 90)] * 3


def section(folder: Path, **params: object) -> object:
    params = {"data_root": str(folder), "size": 64, "buckets": {"step": 32, "max_side": 96}, "flip_p": 0.5, **params}
    return OmegaConf.create({"target": "ldm.data.captioned.CaptionedFolder", "params": params})


def test_a_loader_gives_batches_of_one_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path, SIZES)
    module = DataModuleFromConfig(2, train=section(tmp_path), validation=section(tmp_path), num_workers=2)
    module.setup()
    loader, orders = module.train_dataloader(), []
    told = "train: 12 pictures in 3 sizes; an epoch has 5 batches of 2 and leaves out 2 pictures\n"
    assert capsys.readouterr().out.endswith(told)
    for epoch in range(2):
        loader.batch_sampler.sampler.set_epoch(epoch)
        batches = list(loader)
        orders.append([tuple(batch["index"].tolist()) for batch in batches])
        assert len(batches) == 5 and len({i for order in orders[-1] for i in order}) == 10
        for batch in batches:
            (wide,) = {SIZES[i] for i in batch["index"].tolist()}
            height, width = {(64, 64): (64, 64), (90, 30): (32, 96), (30, 90): (96, 32)}[wide]
            assert batch["image"].shape == (2, height, width, 3)
    assert orders[0] != orders[1]
    assert sorted(i for batch in module.val_dataloader() for i in batch["index"].tolist()) == list(range(12))


def test_a_broken_picture_is_replaced_by_one_of_its_size(tmp_path: Path) -> None:
    write_images(tmp_path, SIZES)
    cut = (tmp_path / "06.png").read_bytes()
    (tmp_path / "06.png").write_bytes(cut[:60])  # its header is whole
    (tmp_path / "01.png").write_bytes(b"no image")
    (tmp_path / "10.txt").unlink()
    data = CaptionedFolder(**section(tmp_path, max_broken=0.25).params)
    assert data.broken == 1 and data.bucket_of[1] == -1
    assert data[6]["index"] == 7 and data[10]["index"] == 11 and data[1, 4]["image"].shape == (64, 64, 3)
    assert data.broken == 3
    with pytest.raises(UserError, match="1 of 12 samples are broken .at most 0 may be"):
        CaptionedFolder(**section(tmp_path, max_broken=0).params)


def test_every_kind_of_set_has_buckets_and_tells_its_files(tmp_path: Path) -> None:
    rows, members = [], {}
    for name, size in (("cat/0", (64, 64)), ("dog/1", (90, 30))):
        path = tmp_path / "classes" / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", size).save(path)
        rows.append({"file_name": f"{name}.png", "caption": name, "width": size[0], "height": size[1]})
        members |= {f"{name}.png": path.read_bytes(), f"{name}.txt": name.encode()}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    images = [{"bytes": contents} for name, contents in members.items() if name.endswith("png")]
    options = {"size": 64, "buckets": {"step": 32, "max_side": 96}}
    classes = tmp_path / "classes"
    pictures = {classes / row["file_name"] for row in rows}
    for data, files in (
        (ClassFolders(str(classes), **options), pictures),
        (CaptionedFolder(str(classes), table="../rows.jsonl", **options), {*pictures, classes / "../rows.jsonl"}),
        (CaptionedFolder(str(classes), **options), {*pictures, *(path.with_suffix(".txt") for path in pictures)}),
        (Shards(str(tmp_path), **options), {tmp_path / "0.tar"}),
        (Rows([{"image": image, "text": ""} for image in images], **options), set()),
        (Rows([{"image": np.zeros((*row, 3), np.uint8), "text": ""} for row in ((9, 9), (3, 9))], **options), set()),
    ):
        shapes = [data.buckets.sizes[number] for number in data.bucket_of]
        assert shapes == [(64, 64), (96, 32)], data.source
        assert set(data.files()) == files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": {"steps": 64}}, "it may be true, or a mapping of step, min_side, max_side"),
        ({"buckets": "64"}, "buckets is '64'"),
        ({"buckets": {"step": 0}}, "step is 0; it must be a whole number"),
        ({"buckets": {"step": 100}}, "no picture has sides in steps of 100"),
        ({"size": None}, "buckets need a size"),
    ],
)
def test_bad_parameters_are_clear_errors(tmp_path: Path, options: dict, message: str) -> None:
    write_images(tmp_path, SIZES[:1])
    with pytest.raises(UserError, match=message):
        CaptionedFolder(**section(tmp_path, **options).params)


def test_a_wrapped_set_still_tells_what_it_has(tmp_path: Path) -> None:
    write_images(tmp_path, SIZES[:3])
    data = CaptionedFolder(**section(tmp_path).params)
    wrapped = pickle.loads(pickle.dumps(WrappedDataset(data)))
    assert list(wrapped.files()) == list(data.files()) and wrapped.by_epoch
    np.testing.assert_array_equal(wrapped.bucket_of, data.bucket_of)
    np.testing.assert_array_equal(wrapped.versions(1)["image"], data.versions(1)["image"])
    assert not hasattr(WrappedDataset([1, 2]), "files")
