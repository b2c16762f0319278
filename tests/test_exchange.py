"""Exchange with diffusers, proven by running both sides: the same latents for the same noise and prompts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.exchange.convert import Conversion
from ldm.loading import load_model
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.weight_files import read_state_dict, write_tensors
from tests.networks import relative_error
from tests.pipelines import KINDS, libraries, pipeline

PROMPTS = ["a red fox, 3 eggs & naïve cafés", "the sea"]
NEGATIVE = "blurry"
STEPS, GUIDANCE = 8, 5.0
SAMPLERS = {"DDIMScheduler": DDIMSampler, "PNDMScheduler": PLMSSampler}

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved pipeline of every kind."""
    root = tmp_path_factory.mktemp("pipelines")
    for kind in KINDS:
        pipeline(kind, root / f"{kind}-parts").save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


def noise() -> torch.Tensor:
    return torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def their_latents(pipe: Any, scheduler: str) -> torch.Tensor:
    diffusers, _ = libraries()
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {"clip_sample": False}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise(),
        output_type="latent",
    )
    return out.images


@torch.no_grad()
def our_latents(model: Any, scheduler: str) -> torch.Tensor:
    samples, _ = SAMPLERS[scheduler](model).sample(
        STEPS,
        len(PROMPTS),
        (4, 8, 8),
        model.get_learned_conditioning(PROMPTS),
        x_T=noise(),
        unconditional_guidance_scale=GUIDANCE,
        unconditional_conditioning=model.get_learned_conditioning([NEGATIVE] * len(PROMPTS)),
        verbose=False,
        show_progress=False,
    )
    return samples


def load_pipeline(path: Path) -> Any:
    diffusers, _ = libraries()
    return diffusers.StableDiffusionPipeline.from_pretrained(path, local_files_only=True)


def schedulers(kind: str) -> list[str]:
    """diffusers' PNDM extrapolates v itself, ours and the paper's the noise: they differ for models that predict v."""
    return ["DDIMScheduler"] if kind == "v2-v" else list(SAMPLERS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_gives_the_same_latents_here(kind: str, folders: dict[str, Path]) -> None:
    pipe = load_pipeline(folders[kind])
    with torch.no_grad():
        model = load_model(None, folders[kind], "cpu")
        for scheduler in schedulers(kind):
            theirs = their_latents(pipe, scheduler)
            assert relative_error(our_latents(model, scheduler), theirs) < 1e-3
        pictures = pipe.vae.decode(theirs / 0.3).sample
        assert relative_error(model.decode_first_stage(theirs), pictures) < 1e-4
        moments = pipe.vae.encode(pictures.clamp(-1, 1)).latent_dist.parameters
        assert relative_error(model.encode_first_stage(pictures.clamp(-1, 1)).parameters, moments) < 1e-4


@pytest.mark.parametrize("kind, suffix", [("v1", ".ckpt"), ("v2-v", ".safetensors"), ("pruned", ".safetensors")])
def test_what_is_written_here_gives_the_same_latents_there(
    kind: str, suffix: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    diffusers, _ = libraries()
    file, written = tmp_path / f"model{suffix}", tmp_path / "written"
    convert = Conversion()
    list(convert(folders[kind], file))
    list(convert(file, written))  # by the yaml that was written beside
    model = load_model(file.with_suffix(".yaml"), file, "cpu")
    from_folder = load_pipeline(written)
    assert type(from_folder.scheduler).__name__ == ("DDIMScheduler" if kind == "v2-v" else "PNDMScheduler")
    from_file = diffusers.StableDiffusionPipeline.from_single_file(file, config=str(written), local_files_only=True)
    for scheduler in schedulers(kind):
        ours = our_latents(model, scheduler)
        for pipe in (from_folder, from_file):
            assert relative_error(ours, their_latents(pipe, scheduler)) < 1e-3
    original, again = (load_pipeline(path) for path in (folders[kind], written))
    for part in ("unet", "vae", "text_encoder"):
        before, after = (getattr(pipe, part).state_dict() for pipe in (original, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_v2_files_may_lack_what_no_picture_depends_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' own script makes such files of its folders, and other programs take them."""
    file, short = tmp_path / "model.safetensors", tmp_path / "short.safetensors"
    list(Conversion()(folders["v2"], file))
    unused = ("text_projection", "logit_scale", "resblocks.2.")  # the last of three blocks
    state = read_state_dict(file)
    less = {k: v for k, v in state.items() if not any(word in k for word in unused)}
    assert len(state) - len(less) == 14
    write_tensors(less, short, "safetensors")
    config = file.with_suffix(".yaml")
    models = [load_model(config, path, "cpu") for path in (file, short)]
    with torch.no_grad():
        first, second = (model.get_learned_conditioning(PROMPTS) for model in models)
    assert torch.equal(first, second)
    list(Conversion(config=config)(short, tmp_path / "written"))
    assert read_state_dict(tmp_path / "written").keys() == state.keys()
