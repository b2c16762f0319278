"""scripts/cache_latents.py, and training on what it wrote: a small random model, a folder of small pictures."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as shards

from ldm.checkpoint import load_encoders, load_into
from ldm.data.module import DataModuleFromConfig
from ldm.errors import UserError
from ldm.modules.randomness import SampleRandom
from ldm.processes import alone_in
from ldm.util import instantiate_from_config
from scripts.cache_latents import main
from tests.networks import ROOT
from tests.training_runs import folder, run
from tests.zoo import build, small_config

CAPTIONS = ["a red dog", "two blue cats", "", "a red dog", "a house", "two cats", "a tree"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model = build(small_config(ROOT / "configs/immiscible/tiny-vanilla.yaml"))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A yaml of the small model and a folder of pictures, half of which are mirrored in an epoch."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32 + 32 * (i % 3), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    config = small_config(ROOT / "configs/immiscible/tiny-vanilla.yaml")
    config.model.params.ucg_training.caption.p = 0.5
    config.data.params = {
        "batch_size": 3,
        "num_workers": 0,
        "train": {
            "target": "ldm.data.captioned.CaptionedFolder",
            "params": {"data_root": str(folder), "size": 32, "flip_p": 0.5, "max_broken": 0},
        },
    }
    OmegaConf.save(config, tmp_path / "base.yaml")
    return tmp_path / "base.yaml"


def cache(base: Path, checkpoint: Path, *words: str, outdir: str = "cache") -> Path:
    """Run the program."""
    directory = base.parent / outdir
    main(["--base", str(base), "--ckpt", str(checkpoint), "--outdir", str(directory), "--device", "cpu", *words])
    return directory


def load(base: Path, checkpoint: Path) -> tuple[DictConfig, nn.Module]:
    config = OmegaConf.load(base)
    model = instantiate_from_config(config.model)
    load_into(model, checkpoint)
    return config, model


def encoded(config: DictConfig, model: nn.Module, cache_latents: Any, **options: Any) -> DataModuleFromConfig:
    params = OmegaConf.to_container(config.data.params) | {"cache_latents": cache_latents, **options}
    module = DataModuleFromConfig(**params)
    module.setup()
    module.encode(model, torch.device("cpu"))
    return module


def written(directory: Path) -> dict[str, tuple[int, int]]:
    """Which files there are, and when they were written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()}


def losses(module: DataModuleFromConfig, model: nn.Module) -> list[float]:
    """Of two epochs, each step with its own random numbers."""
    model.train()
    loader, found = module.train_dataloader(), []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            random = SampleRandom(5, len(found), 0, len(batch["caption"]), "cpu")
            found.append(model.shared_step(batch, random)[0].item())
    return found


def test_training_from_a_cache_has_the_same_losses(base: Path, checkpoint: Path) -> None:
    config, model = load(base, checkpoint)
    plain = losses(encoded(config, model, False), model)
    in_memory = losses(encoded(config, model, True), model)
    directory = cache(base, checkpoint, "--samples_per_file", "3", "--batch_size", "2")
    halves = cache(base, checkpoint, "--half", outdir="halves")
    modules = [encoded(config, model, str(directory), num_workers=2), encoded(config, model, str(halves))]
    rough = losses(modules[1], model)
    config, model = load(base, checkpoint)
    module = encoded(config, model, str(directory), num_workers=2)
    for part in (model.first_stage_model, model.cond_stage_model):
        for parameter in part.parameters():
            parameter.zero_()  # neither is asked again, not even for dropped captions
    from_disk = losses(module, model)
    assert len(plain) == 4 and len(set(plain)) == 4
    np.testing.assert_allclose(in_memory, plain, rtol=1e-5)
    np.testing.assert_allclose(from_disk, plain, rtol=1e-5)
    np.testing.assert_allclose(rough, plain, rtol=5e-3)
    assert sorted(path.name for path in directory.iterdir()) == [
        "latents-00000.safetensors", "latents-00001.safetensors", "latents-00002.safetensors", "manifest.json",
        "texts-00000.safetensors", "texts-00001.safetensors",
    ]  # fmt: skip
    texts = sum(len(load_file(path)["embeddings"]) for path in directory.glob("texts-*"))
    assert texts == len({"", *CAPTIONS})  # each once


def test_captions_that_are_not_in_the_cache_are_encoded(base: Path, checkpoint: Path) -> None:
    config, model = load(base, checkpoint)
    words = ["a red dog", "a submarine"]
    direct = model.get_learned_conditioning(words), model.get_learned_conditioning(words[:1])
    keys = set(model.state_dict())
    encoded(config, model, str(cache(base, checkpoint)))
    for before, captions in zip(direct, (words, words[:1]), strict=True):
        torch.testing.assert_close(model.get_learned_conditioning(captions), before)
    assert set(model.state_dict()) == keys


def test_a_stopped_program_goes_on_and_a_finished_one_does_nothing(
    base: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    config, model = load(base, checkpoint)
    words = ("--samples_per_file", "2", "--batch_size", "1")
    whole = cache(base, checkpoint, *words, outdir="whole")
    photo = base.parent / "photos" / "5.png"
    contents, times = photo.read_bytes(), (photo.stat().st_atime_ns, photo.stat().st_mtime_ns)
    photo.write_bytes(bytes(len(contents)))
    os.utime(photo, ns=times)  # it looks as it did: the program stops there, in its third file
    with pytest.raises(UserError, match="1 of 7 samples are broken"):
        cache(base, checkpoint, *words)
    directory = base.parent / "cache"
    assert not list(directory.glob("texts-*")) and len(list(directory.glob("latents-*"))) == 2
    again = "python scripts/cache_latents.py --base YAML --outdir .*/cache --samples_per_file 2"
    with pytest.raises(UserError, match=f"is not finished; go on with it: {again}"):
        encoded(config, model, str(directory))
    photo.write_bytes(contents)
    os.utime(photo, ns=times)
    (directory / ".latents-00002.safetensors.x.tmp").write_bytes(b"of a killed run")
    first = written(directory)["latents-00000.safetensors"]
    cache(base, checkpoint, *words)
    assert written(directory)["latents-00000.safetensors"] == first  # not written again
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in directory.iterdir()) == names
    for name in names[:-1]:
        assert name == "manifest.json" or (directory / name).read_bytes() == (whole / name).read_bytes()
    capsys.readouterr()
    before = written(directory)
    cache(base, checkpoint, *words)
    assert "is current: 7 samples" in capsys.readouterr().out
    assert written(directory) == before
    cut = directory / "latents-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"latents-00001.safetensors is damaged; mend it: {again}"):
        encoded(config, model, str(directory))
    cache(base, checkpoint, *words)
    assert cut.read_bytes() == (whole / cut.name).read_bytes()


def test_a_changed_model_or_data_is_refused_and_made_anew(base: Path, checkpoint: Path) -> None:
    config, model = load(base, checkpoint)
    with pytest.raises(UserError, match="no cache is in 'nowhere'; make it: python scripts/cache_latents.py --base"):
        encoded(config, model, "nowhere")
    directory = cache(base, checkpoint)
    command = f"anew: python scripts/cache_latents.py --base YAML --outdir {directory}"
    for part, name in (("first_stage_model", "autoencoder"), ("cond_stage_model", "text encoder")):
        other = load(base, checkpoint)[1]
        next(getattr(other, part).parameters()).data.add_(1e-3)
        with pytest.raises(UserError, match=f"was made with another {name}; {command}"):
            encoded(config, other, str(directory))
    changed = config.copy()
    changed.model.params.cond_stage_config.params.architecture.num_attention_heads = 1  # the weights are as before
    other = instantiate_from_config(changed.model)
    load_into(other, checkpoint)
    with pytest.raises(UserError, match="was made with another text encoder"):
        encoded(config, other, str(directory))
    other = load(base, checkpoint)[1]
    other.first_stage_key = "photo"
    with pytest.raises(UserError, match=f"was made of 'image', another first_stage_key; {command}"):
        encoded(config, other, str(directory))
    changed.data.params.train.params.crop = "random"
    with pytest.raises(UserError, match="was made of other data .*; anew"):
        encoded(changed, model, str(directory))
    (base.parent / "photos" / "0.txt").write_text("a green dog")
    with pytest.raises(UserError, match="was made of other data .*; anew"):
        encoded(config, model, str(directory))
    cache(base, checkpoint)
    captions = [sample["caption"] for sample in encoded(config, model, str(directory)).datasets["train"]]
    assert captions == ["a green dog", *CAPTIONS[1:]]
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps({"origin": 5}))
    with pytest.raises(UserError, match="manifest.json cannot be read as a cache's .*; give another folder"):
        encoded(config, model, str(directory))


def test_the_command_for_a_new_cache_is_of_the_training_that_asks(base: Path, checkpoint: Path) -> None:
    directory = cache(base, checkpoint, "--half")
    other = base.with_name("other.yaml")
    changed = OmegaConf.load(base)
    changed.data.params.train.params.flip_p = 0
    OmegaConf.save(changed, other)
    words = ["--base", other, f"data.params.cache_latents={directory}", "lightning.callbacks=null"]
    command = f"python scripts/cache_latents.py {shlex.join(map(str, words))} --ckpt {checkpoint} --outdir {directory}"
    with pytest.raises(UserError, match=f"anew: {re.escape(command)} --half$"):
        run(base.parent / "logs", *words, "--actual_resume", checkpoint)


def test_a_folder_is_for_one_program_at_a_time(base: Path, checkpoint: Path) -> None:
    directory = base.parent / "cache"
    with alone_in(directory):
        (directory / ".latents-00000.safetensors.x.tmp").touch()
        with pytest.raises(UserError, match="another program is writing to .*/cache; let it end"):
            cache(base, checkpoint)
        (directory / ".latents-00000.safetensors.x.tmp").unlink()
    cache(base, checkpoint)


class Stream(torch.utils.data.IterableDataset):
    """Samples without numbers."""

    def __iter__(self) -> Any:
        yield {"image": np.zeros((32, 32, 3), np.float32), "caption": "a stream"}


def test_latents_of_a_stream_are_not_cached(base: Path, checkpoint: Path) -> None:
    config = OmegaConf.load(base)
    config.data.params.train = {"target": f"{__name__}.Stream"}
    OmegaConf.save(config, base)
    message = "latents of Stream cannot be cached: it is a stream"
    with pytest.raises(UserError, match=message):
        cache(base, checkpoint)
    config, model = load(base, checkpoint)
    for where in (True, str(cache_of_another_set(base, checkpoint))):
        with pytest.raises(UserError, match=message):
            encoded(config, model, where)


def cache_of_another_set(base: Path, checkpoint: Path) -> Path:
    folder = {"target": "ldm.data.captioned.CaptionedFolder", "params": {"data_root": str(base.parent), "size": 32}}
    words = [f"data.params.train.{key}={value}" for key, value in folder.items()]
    return cache(base, checkpoint, *words, outdir="another")


def test_a_trained_text_encoder_is_not_cached(base: Path, checkpoint: Path) -> None:
    directory = cache(base, checkpoint, "model.params.cond_stage_trainable=true")
    assert not list(directory.glob("texts-*"))
    config, model = load(base, checkpoint)
    assert len(encoded(config, model, str(directory)).datasets["train"]) == 7


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_resumed_run_has_the_encoders_that_it_began_with(base: Path, checkpoint: Path, on_disk: bool) -> None:
    where = cache(base, checkpoint) if on_disk else True
    config, model = load(base, checkpoint)
    expected = encoded(config, model, where).datasets["train"][0]["moments"]
    words = [f"data.params.cache_latents={where}", "lightning.trainer.logger=false", "lightning.callbacks=null"]
    run(base.parent / "logs", "--base", base, *words, "--actual_resume", checkpoint, "--max_steps", 1)
    trainer = run(base.parent / "logs", "--resume", folder(base.parent / "logs"), "--max_steps", 2)
    torch.testing.assert_close(trainer.datamodule.datasets["train"][0]["moments"], expected)


def test_encoders_come_from_the_folder_that_a_sharded_run_saved(base: Path, checkpoint: Path) -> None:
    trained, folder = load(base, checkpoint)[1], base.parent / "last.ckpt"
    shards.save({"model": trained.state_dict()}, checkpoint_id=folder, no_dist=True)
    model = instantiate_from_config(OmegaConf.load(base).model)
    network = {name: value.clone() for name, value in model.model.state_dict().items()}
    load_encoders(model, folder)
    for name, value in model.state_dict().items():
        if name.startswith(("first_stage_model.", "cond_stage_model.")):
            torch.testing.assert_close(value, trained.state_dict()[name], rtol=0, atol=0)
    torch.testing.assert_close(model.model.state_dict(), network, rtol=0, atol=0)


def test_a_resumed_run_whose_encoders_cannot_be_read_asks_for_them(base: Path, checkpoint: Path) -> None:
    words = ["data.params.cache_latents=true", "lightning.trainer.logger=false", "lightning.callbacks=null"]
    run(base.parent / "logs", "--base", base, *words, "--actual_resume", checkpoint, "--max_steps", 1)
    checkpoints = folder(base.parent / "logs") / "checkpoints"
    for path in checkpoints.iterdir():
        path.unlink()
    (checkpoints / "last.ckpt").mkdir()
    with pytest.raises(UserError, match="last.ckpt' is a folder that cannot be read .* give --actual_resume CKPT"):
        run(base.parent / "logs", "--resume", folder(base.parent / "logs"), "--max_steps", 2)


def test_pictures_of_many_sizes(base: Path, checkpoint: Path) -> None:
    config, model = load(base, checkpoint)
    config.data.params.train.params |= {"buckets": {"step": 16, "max_side": 64}}
    OmegaConf.save(config, base)
    module = encoded(config, model, str(cache(base, checkpoint)))
    plain = encoded(config, model, False).datasets["train"]
    seen = set()
    for batch in module.train_dataloader():
        for index, moments in zip(batch["index"].tolist(), batch["moments"], strict=True):
            image = torch.from_numpy(plain[0, index]["image"]).permute(2, 0, 1)[None]
            torch.testing.assert_close(moments[None], model.encode_first_stage(image).parameters, rtol=1e-4, atol=1e-4)
        seen.add(tuple(moments.shape[1:]))
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--ckpt", "none.ckpt"], "--ckpt: there is no checkpoint 'none.ckpt'"),
        (["--outdir", "README.md"], "--outdir: 'README.md' is a file"),
        (["--base", "configs/tiny/autoencoder.yaml"], "no first_stage_config"),
        (["data.params.train=null"], "no data.params.train"),
        (["data.target=main_dream_booth.DataModuleFromConfig"], "encodes its photos itself"),
        (["--outdir", "configs"], "configs holds other files and no manifest.json"),
    ],
)
def test_wrong_input_is_one_clear_line(base: Path, checkpoint: Path, words: list[str], message: str) -> None:
    usual = {"--base": str(base), "--outdir": str(base.parent / "cache"), "--ckpt": str(checkpoint)}
    given = [word for flag, value in usual.items() if flag not in words for word in (flag, value)]
    with pytest.raises(UserError, match=message):
        main([*given, "--device", "cpu", *words])
    assert not (base.parent / "cache").exists()
