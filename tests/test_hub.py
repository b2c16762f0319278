"""Models by the hub's name: out of the hub client's cache, without a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm import hub
from ldm.errors import UserError

PIPELINE = [
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/merges.txt",
]  # fmt: skip


def put(cache: Path, name: str, files: list[str]) -> Path:
    """A model in the cache, as the hub's client leaves it: links to files whose names are hashes."""
    root = cache / f"models--{name.replace('/', '--')}"
    folder = root / "snapshots" / "0123abcd"
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (root / "blobs").mkdir(exist_ok=True)
        (root / "blobs" / str(number)).write_text(file)
        (folder / file).symlink_to(os.path.relpath(root / "blobs" / str(number), (folder / file).parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abcd")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("kind", ["safetensors", "bin", "fp16.safetensors"])
def test_a_pipeline(kind: str, cache: Path) -> None:
    weights = [f"{part}diffusion_pytorch_model.{kind}" for part in hub.PIPELINE_PARTS]
    folder = put(cache, "someone/drawings", [*PIPELINE, *weights])
    assert hub.find_checkpoint("someone/drawings") == folder
    assert hub.called(folder) == "drawings"
    assert hub.autoencoder_folder("someone/drawings") == folder


def test_an_autoencoder(cache: Path) -> None:
    folder = put(cache, "someone/decoder", ["config.json", "diffusion_pytorch_model.safetensors"])
    assert hub.autoencoder_folder("someone/decoder") == folder
    with pytest.raises(UserError, match="^--ckpt: there is no file 'someone/decoder', and the model hub"):
        hub.find_checkpoint("someone/decoder")


def test_what_is_nowhere_or_in_part_is_told_in_a_line(cache: Path) -> None:
    put(cache, "someone/partial", [*PIPELINE, "unet/diffusion_pytorch_model.safetensors"])
    for name in ("someone/partial", "no/model"):
        for find, flag in ((hub.find_checkpoint, "--ckpt"), (hub.autoencoder_folder, "--vae")):
            with pytest.raises(UserError, match=f"^{flag}: there is no file '{name}'.*hub.*\\(.+\\)$") as caught:
                find(name)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path, name", [("a/b", True), ("a/b.ckpt", False), ("a", False), ("./b", False), ("a/b/c", False), ("a/", False)]
)
def test_names_of_the_hub(path: str, name: bool) -> None:
    assert hub.is_hub_name(path) == name


def test_paths_are_left_alone(cache: Path) -> None:
    (cache / "here").mkdir()
    for path in (cache / "here", Path("nowhere.ckpt")):
        assert hub.find_checkpoint(path) == path
    called = {"a/model.v2.ckpt": "model.v2", "a/sd-v1.4": "sd-v1.4", "b.safetensors": "b"}
    assert {path: hub.called(path) for path in called} == called
