"""LoRA files: diffusers loads ours and draws the same latents, we load diffusers', and both can be merged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ldm.errors import UserError
from ldm.exchange import lora as files
from ldm.exchange.convert import Conversion
from ldm.exchange.folder import read_config
from ldm.loading import load_model
from ldm.models.diffusion.lcm import LCMSampler
from ldm.modules import lora
from ldm.weight_files import read_state_dict
from tests.goldens.fill import data
from tests.networks import relative_error
from tests.pipelines import libraries, pipeline

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PREFIX = "model.diffusion_model."
PROMPTS, SEEDS = ["a red fox", "the sea"], (4, 9)
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
LAYER_UP, LAYER_ALPHA = LAYER.replace("lora_A", "lora_B"), LAYER.replace("lora_A.weight", "alpha")


@pytest.fixture(scope="module", params=["v1", "v2-v"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline's folder, and the file of a LoRA of rank 3 that was injected and filled here."""
    root = tmp_path_factory.mktemp("lora")
    folder, path = root / "pipeline", root / "lora.safetensors"
    pipeline(request.param, root / "parts").save_pretrained(folder)
    unet = load_model(None, folder, "cpu").model.diffusion_model
    lora.inject(unet, lora.LoraConfig(rank=3))
    weights = {key: data(key, tuple(value.shape), 0.2) for key, value in lora.weights_of(unet).items()}
    files.write({PREFIX + key: value for key, value in weights.items()}, read_config(folder).model.params, path)
    return folder, path


def read(folder: Path, path: Path) -> dict[str, torch.Tensor]:
    model = load_model(None, folder, "cpu")
    return files.read(path, model.yaml_params, {key: value.shape for key, value in model.state_dict().items()})


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@torch.no_grad()
def their_latents(pipe: Any) -> torch.Tensor:
    diffusers, _ = libraries()
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(PROMPTS, num_inference_steps=4, guidance_scale=1.0, generator=generators(), output_type="latent")
    return out.images


@torch.no_grad()
def our_latents(model: Any) -> torch.Tensor:
    c = model.get_learned_conditioning(PROMPTS)
    return LCMSampler(model).sample(4, 2, (4, 8, 8), c, generator=generators(), show_progress=False)[0]


def test_diffusers_draws_the_same_latents_with_the_file(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = made
    pipe = libraries()[0].StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    plain = their_latents(pipe)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    theirs = their_latents(pipe)
    model = load_model(None, folder, "cpu", artefacts={path: 1.0})
    assert relative_error(our_latents(model), theirs) < 2e-3 < relative_error(plain, theirs)
    assert relative_error(our_latents(load_model(None, folder, "cpu", artefacts={path: 0.0})), plain) < 2e-3
    theirs_again = get_peft_model_state_dict(pipe.unet, adapter_name=pipe.get_active_adapters()[0])
    pipe.save_lora_weights(tmp_path, unet_lora_layers=theirs_again)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    again = read(folder, tmp_path / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in read(folder, path).items())
    assert saved.keys() == load_file(path).keys()


def test_merged_into_a_checkpoint_it_is_the_same_model(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = made
    merged = tmp_path / "merged.safetensors"
    list(Conversion(artefacts={path: 0.5})(folder, merged))
    ours = load_model(None, folder, "cpu", artefacts={path: 0.5}).state_dict()
    plain = load_model(None, folder, "cpu").state_dict()
    state = read_state_dict(merged)
    changed = {key for key in plain if not torch.equal(plain[key], ours[key])}
    assert len(changed) == len(load_file(path)) // 2
    assert all(torch.equal(state[key], ours[key]) for key in changed)


def test_alpha_scales_what_is_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = made
    tensors = load_file(path)
    tensors[LAYER_ALPHA] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "alpha.safetensors")
    plain, scaled = read(folder, path), read(folder, tmp_path / "alpha.safetensors")
    different = [key for key in plain if not torch.equal(plain[key], scaled[key])]
    assert len(different) == 1 and torch.equal(scaled[different[0]], plain[different[0]] / 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unet.nowhere.lora_A.weight": (3, 3), "te.x": (1,)}, ["unet.nowhere.lora_A.weight", "te.x"]),
        ({LAYER: None}, ["half of it"]),
        ({LAYER: (3, 7)}, ["is [32, 32] in the network, and [32, 7] in the file"]),
        ({LAYER: None, LAYER_UP: None, LAYER_ALPHA: ()}, ["attn1.to_q (alpha alone)"]),
        ({LAYER_ALPHA: (2,)}, [LAYER_ALPHA]),
        ({LAYER: ()}, ["its halves, [] and [32, 3], do not fit"]),
        ({LAYER: (0, 32), LAYER_UP: (32, 0), LAYER_ALPHA: ()}, ["its halves, [0, 32] and [32, 0], do not fit"]),
        ({LAYER: (4, 32)}, ["its halves, [4, 32] and [32, 3], do not fit"]),
        ({LAYER_UP: (32, 3, 3, 3)}, ["do not fit"]),
    ],
)
def test_keys_that_do_not_match_are_listed(change: dict, said: list[str], made: Any, tmp_path: Path) -> None:
    folder, path = made
    tensors = load_file(path)
    for key, shape in change.items():
        if shape is None:
            del tensors[key]
        else:
            tensors[key] = torch.zeros(shape)
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError) as error:
        load_model(None, folder, "cpu", artefacts={tmp_path / "wrong.safetensors": 1.0})
    assert all(words in str(error.value) for words in said)


def test_what_is_no_safetensors_file_is_told(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="neither a .ckpt nor"):
        load_model(None, made[0], "cpu", artefacts={tmp_path / "x.safetensors": 1.0})
