"""Rows `dreambooth`, `dreambooth_unchecked` and `finetune`: one training step, forward, backward and optimiser.

python benchmarks/training_step.py                # 512x512; the last row needs 20 GiB
python benchmarks/training_step.py --size tiny    # to see that it runs

Each side does what its program does by default: our DreamBooth encodes photos and captions once, before training
(their time is not the step's), diffusers' script in every step. Checkpointing is the same on both sides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import random_model
from benchmarks.command import run_rows
from benchmarks.side_by_side import Job, Row, Settings, Way
from ldm import cli

RANK = 16
CLIP = 1.0  # of the gradient's norm: what diffusers' scripts do by default


def images(settings: Settings, batch: int) -> Any:
    """Pixels [B, 3, H, W]."""
    side = 8 * random_model.latent_side(settings)
    return random_model.draw(batch, 3, side, side).clamp(-1, 1).to(settings.device)


def least_bytes(trained: Iterable[Any], *networks: Any) -> int:
    """Weights are read forward and backward; of trained ones also gradient, two moments and value are written."""
    trained = sum(p.numel() * p.element_size() for p in trained)
    return 2 * random_model.size_of(*networks) + 8 * trained


def precision(settings: Settings) -> Any:
    """bf16 by autocast on a GPU."""
    import torch

    return torch.autocast(settings.device.partition(":")[0], torch.bfloat16, enabled=settings.device != "cpu")


def our_model(settings: Settings, path: Path, **changes: Any) -> Any:
    """A model to be trained, as `ldm.training` builds it."""
    import torch

    from ldm.checkpoint import load_into
    from ldm.memory import keep_freed
    from ldm.modules.fast_layers import speed_up
    from ldm.util import instantiate_from_config

    config = random_model.config_of(path, settings.size, **changes)
    model = instantiate_from_config(config.model).to(memory_format=torch.channels_last)
    load_into(model, random_model.pipeline(settings))
    speed_up(model, keep=False)  # both as `ldm.training.train` does
    keep_freed()
    return model.to(settings.device).train()


def our_job(settings: Settings, model: Any, batch: dict[str, Any], clip: float | None = None) -> Job:
    import torch

    optimizer = model.make_optimizer(fused=True)
    size = model.batch_size_of(batch)

    def work() -> None:
        with precision(settings):
            loss, _ = model.shared_step(batch, model.step_random(size))
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        model.batches_seen += 1

    x, t, context = probe(settings, model.model.diffusion_model.context_dim)
    unet = model.model.diffusion_model

    def result() -> torch.Tensor:
        with torch.no_grad(), precision(settings):
            return unet(x, t, context)

    return Job(work, result, least_bytes=least_bytes(model.trainable_parameters(), unet))


def their_job(
    settings: Settings, pipe: Any, trained: list[Any], batch: int, checkpoint: bool, fused: bool, prior: bool
) -> Job:
    """The inside of the loop of diffusers' train_dreambooth_lora.py and train_text_to_image.py."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler

    unet, vae, text = pipe.unet, pipe.vae, pipe.text_encoder
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    unet.train()
    if checkpoint:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=fused)
    pixels = images(settings, batch)
    captions = [random_model.PROMPTS[i % 2] for i in range(batch)]
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids.to(
        pixels.device
    )

    def work() -> None:
        with precision(settings):
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (batch,), device=latents.device)
            noisy = scheduler.add_noise(latents, noise, t)
            context = text(tokens, return_dict=False)[0]
            prediction = unet(noisy, t, context, return_dict=False)[0]
            if prior:
                losses = map(F.mse_loss, prediction.float().chunk(2), noise.float().chunk(2))
                loss = sum(losses)
            else:
                loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    x, t, context = probe(settings, unet.config.cross_attention_dim)

    def result() -> torch.Tensor:
        with torch.no_grad(), precision(settings):
            return unet(x, t, context, return_dict=False)[0]

    return Job(work, result, least_bytes=least_bytes(trained, unet))


def probe(settings: Settings, width: int) -> list[Any]:
    """What the untrained networks are compared on: new adapters and new LoRAs do nothing yet."""
    import torch

    side = random_model.latent_side(settings)
    values = random_model.draw(1, 4, side, side), torch.tensor([500]), random_model.draw(1, 77, width, seed=1)
    return [value.to(settings.device) for value in values]


def our_dreambooth(settings: Settings, checkpoint: bool) -> Job:
    """Instance and prior photo, their posteriors known, in one pass."""
    import torch

    model = our_model(settings, random_model.ADAPTERS, unet_config__params__use_checkpoint=checkpoint)
    with torch.no_grad():
        moments = model.encode_first_stage(images(settings, 2)).parameters
    batch = {
        name: {"moments": moments[i : i + 1], "caption": [random_model.PROMPTS[i]]}
        for i, name in enumerate(("instance", "prior"))
    }
    return our_job(settings, model, batch)


def their_dreambooth(settings: Settings, checkpoint: bool) -> Job:
    from peft import LoraConfig

    pipe = their_pipeline(settings)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers))
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    return their_job(settings, pipe, trained, 2, checkpoint, fused=False, prior=True)


def our_finetune(settings: Settings) -> Job:
    """The whole U-Net on one captioned picture."""
    model = our_model(settings, random_model.YAML)
    pixels = images(settings, 1).permute(0, 2, 3, 1)
    return our_job(settings, model, {"jpg": pixels, "txt": [random_model.PROMPTS[0]]}, clip=CLIP)


def their_finetune(settings: Settings) -> Job:
    pipe = their_pipeline(settings)
    pipe.unet.requires_grad_(True)
    return their_job(settings, pipe, list(pipe.unet.parameters()), 1, True, fused=False, prior=False)


def their_pipeline(settings: Settings) -> Any:
    """Networks as the scripts load them: in float32 and the usual layout."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(random_model.pipeline(settings), local_files_only=True)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    return pipe.to(settings.device)


def rows(settings: Settings) -> list[Row]:
    """The rows of this file."""

    def row(name: str, title: str, ours: Any, theirs: Any, peer: str, arguments: dict[str, Any], **more: Any) -> Row:
        here = Way("step here", ours, arguments, random_model.OURS)
        there = Way(peer, theirs, arguments, random_model.THEIRS)
        tolerance = 1e-3 if settings.device == "cpu" else 0.05
        more = {"rounds": 3, "tolerance": tolerance, "prepare": random_model.write, **more}
        return Row(name, title, here, there, **more)

    lora = f"diffusers with peft, LoRA r={RANK}"
    adapters = our_dreambooth, their_dreambooth, lora
    return [
        row("dreambooth", "DreamBooth step, attn2o-ffni, 1 + 1 prior", *adapters, {"checkpoint": True},
            bar=0.8, memory_bar=0.9),
        row("dreambooth_unchecked", "the same without checkpointing", *adapters, {"checkpoint": False},
            bar=0.8, memory_bar=0.9, fresh=settings.full, rounds=2),
        row("finetune", "step of the whole U-Net, batch 1", our_finetune, their_finetune,
            "diffusers' train_text_to_image", {}, bar=0.95, memory_bar=1.0, fresh=settings.full, rounds=2),
    ]  # fmt: skip


if __name__ == "__main__":
    cli.run(lambda argv: run_rows(rows, argv, __doc__))
