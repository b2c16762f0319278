"""DreamBooth (Ruiz et al., 2023) with adapters (Xiang et al., 2023): a few photos of one subject, and prior images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldm.models.diffusion import ddpm
from ldm.modules import adapters
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.randomness import GlobalRandom, Randomness
from ldm.signals import abandon_pictures
from ldm.util import UserError, count_params

TRAIN_LEVELS = ("adapter", "unet")


class LatentDiffusion(ddpm.LatentDiffusion):
    """Latent diffusion of which a part is trained on instance and prior images together.

    Batches are {"instance": {...}, "prior": {...}}, the prior optional; both go through the U-Net in one pass, and
    loss = instance loss + reg_weight * prior loss.

    Args beyond LatentDiffusion's:
        reg_weight: weight of the prior images' loss.
        train_level: what is trained: `adapter`, `unet` or both. Nothing else gets gradients: the autoencoder and the
            text encoder are frozen, whatever cond_stage_trainable says, and their results are computed once.
        cond_stage_trainable: unused. use_ema: average what is trained. personalization_config: not yet there.
    """

    def __init__(
        self,
        *args: Any,
        reg_weight: float = 1.0,
        train_level: Sequence[str] = ("adapter",),
        cond_stage_trainable: bool = False,
        use_ema: bool = False,
        personalization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        levels = [train_level] if isinstance(train_level, str) else list(train_level)
        if "embeder" in levels or personalization_config is not None:
            raise UserError(
                "yaml: model.params.train_level: embeder (textual inversion) is not yet there; use adapter or unet"
            )
        if not levels or set(levels) - set(TRAIN_LEVELS):
            raise UserError(f"yaml: model.params.train_level holds {levels}; it may hold {', '.join(TRAIN_LEVELS)}")
        if not isinstance(reg_weight, (int, float)) or reg_weight < 0:
            raise UserError(f"yaml: model.params.reg_weight holds {reg_weight!r}; it must be a number of at least 0")
        self.train_level, self.reg_weight = levels, float(reg_weight)
        self.contexts: dict[str, torch.Tensor] = {}
        super().__init__(*args, cond_stage_trainable=False, use_ema=use_ema, **kwargs)

    def build_stages(self) -> None:
        super().build_stages()
        unet = self.model.diffusion_model
        unet.requires_grad_("unet" in self.train_level)
        for parameter in unet.adapter_parameters():
            parameter.requires_grad_("adapter" in self.train_level)
        if self.use_ema:  # made anew, without copies of what is frozen
            self.model_ema = LitEma(self.model, decay=float(self.model_ema.decay))

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Training mode for what is trained; what is frozen stays in eval mode."""
        super().train(mode)
        unet = self.model.diffusion_model
        if mode and "unet" not in self.train_level:
            unet.eval()
            for adapter in adapters.find(unet).values():
                adapter.train()
        return self

    def on_fit_start(self) -> None:
        """Say how much is trained."""
        unet, trained = self.model.diffusion_model, sum(p.numel() for p in self.trainable_parameters())
        whole = count_params(unet) - sum(p.numel() for p in unet.adapter_parameters())
        if self.trainer.is_global_zero:
            share = trained / whole
            print(f"Trains {trained:,} parameters ({' and '.join(self.train_level)}), {share:.3%} of the U-Net's")

    def trainable_parameters(self) -> list[nn.Parameter]:
        if "adapter" in self.train_level and not list(self.model.diffusion_model.adapter_parameters()):
            raise UserError("yaml: train_level holds adapter, but unet_config has no adapter_config")
        return super().trainable_parameters()

    @property
    def strict_loading(self) -> bool:
        """Checkpoints of adapter training hold only what was trained."""
        return "unet" in self.train_level

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leave frozen weights out of adapter training's checkpoints: they are in the base model's file."""
        super().on_save_checkpoint(checkpoint)
        if not self.strict_loading:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    @torch.no_grad()
    def get_learned_conditioning(self, c: Any) -> Any:
        """The captions' encoding; each different caption is encoded once."""
        if not (isinstance(c, (list, tuple)) and all(isinstance(text, str) for text in c)):
            return super().get_learned_conditioning(c)
        for text in dict.fromkeys(c):
            known = self.contexts.get(text)
            if known is None or known.device != self.device:
                self.contexts[text] = super().get_learned_conditioning([text])
        return torch.cat([self.contexts[text] for text in c])

    def get_latents(self, batch: dict, random: Randomness | None = None) -> torch.Tensor:
        return super().get_latents(batch.get("instance", batch), random)

    def training_batch(self, batch: dict, random: Randomness | None) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Latents and context of instances, then priors, as one batch; and how many are instances."""
        parts = [batch["instance"], *([batch["prior"]] if "prior" in batch else [])]
        posteriors = [p["moments"] if "moments" in p else self.encode_images(p) for p in parts]
        z = self.get_first_stage_encoding(DiagonalGaussianDistribution(torch.cat(posteriors)), random).detach()
        captions = [text for part in parts for text in part[self.cond_stage_key]]
        return z, self.get_learned_conditioning(captions), len(posteriors[0])

    def encode_images(self, batch: dict) -> torch.Tensor:
        """Posterior moments of images that were not encoded before."""
        return self.encode_first_stage(ddpm.DDPM.get_input(self, batch, self.first_stage_key)).parameters

    def batch_size_of(self, batch: dict) -> int:
        if "instance" not in batch:
            return super().batch_size_of(batch)
        return sum(super(LatentDiffusion, self).batch_size_of(part) for part in batch.values())

    def shared_step(self, batch: dict, random: Randomness | None = None) -> tuple[torch.Tensor, dict]:
        """Loss and logs of a batch of pairs, or of a plain batch (validation)."""
        if "instance" not in batch:
            return super().shared_step(batch, random)
        random = random or GlobalRandom(self.batch_size_of(batch), self.device)
        z, context, instances = self.training_batch(batch, random)
        t = random.randint(self.num_timesteps).to(z.device)
        noise = self.draw_noise(z, random)
        prediction = self.apply_model(self.add_noise(z, t, noise, random), t, context)
        losses = self.get_loss(prediction, self.training_target(z, noise, t))
        prefix = "train" if self.training else "val"
        total, logs = self.weigh_loss(losses[:instances], t[:instances], prefix)
        if instances < len(losses):
            prior, _ = self.weigh_loss(losses[instances:], t[instances:], prefix)
            total = total + self.reg_weight * prior
            logs |= {f"{prefix}/loss_prior": prior.detach(), f"{prefix}/loss": total.detach()}
        return total, logs

    @torch.no_grad()
    def log_images(
        self,
        batch: dict,
        N: int = 4,
        steps: int = 20,
        unconditional_guidance_scale: float = 7.5,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Pictures in [-1, 1]: photos as the autoencoder shows them, and samples of both captions (DPM-Solver++).

        With `prompts`, samples of these too; all from the noises of the seeds `seed`, seed + 1, ...
        """
        from ldm.models.diffusion.dpm_solver import DPMSolverSampler

        def draw(captions: list[str], shape: Sequence[int]) -> torch.Tensor:
            samples, _ = DPMSolverSampler(self).sample(
                steps, len(captions), shape, self.get_learned_conditioning(captions),
                verbose=False, show_progress=False, unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=self.get_unconditional_conditioning(len(captions)),
                generator=ddpm.noises(seed, len(captions)), callback=abandon_pictures,
            )  # fmt: skip
            return self.decode_first_stage(samples)

        parts = batch if "instance" in batch else {"instance": batch}
        logs = {}
        for name, part in parts.items():
            part = {key: value[:N] for key, value in part.items()}
            moments = part["moments"] if "moments" in part else self.encode_images(part)
            z = self.get_first_stage_encoding(DiagonalGaussianDistribution(moments))
            drawn = draw(list(part[self.cond_stage_key]), z.shape[1:])
            logs |= {f"{name}": self.decode_first_stage(z), f"{name}_samples": drawn}
        return logs | ({"prompts_samples": draw(list(prompts), z.shape[1:])} if prompts else {})
