"""DDPM on images: the network with its condition, the loss of its discrete timesteps, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.models.diffusion.trainer import DiffusionTrainer, noises
from ldm.modules.randomness import GlobalRandom, Randomness
from ldm.signals import abandon_pictures
from ldm.util import UserError, instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")
Conditioning = torch.Tensor | dict[str, list[torch.Tensor]] | list[torch.Tensor] | None


class DiffusionWrapper(nn.Module):
    """The U-Net and the way in which a condition reaches it.

    Args:
        diff_model_config: yaml section of the U-Net.
        conditioning_key: None; `concat` (channels beside x); `crossattn` (tokens for attention); `hybrid` (both); `adm`
            (a class label).
    """

    def __init__(self, diff_model_config: Any, conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            known = ", ".join(str(k) for k in CONDITIONING_KEYS)
            raise UserError(f"yaml: conditioning_key: '{conditioning_key}' is none of {known}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: list[torch.Tensor] | None = None,
        c_crossattn: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Network output [B, C, H, W] for x [B, C, H, W] at timesteps t [B]."""
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *c_concat], dim=1)
        if self.conditioning_key in ("crossattn", "hybrid"):
            context = c_crossattn[0] if len(c_crossattn) == 1 else torch.cat(c_crossattn, dim=1)
            return self.diffusion_model(x, t, context=context)
        if self.conditioning_key == "adm":
            return self.diffusion_model(x, t, y=c_crossattn[0])
        return self.diffusion_model(x, t)

    def predict(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning = None) -> torch.Tensor:
        """`forward` for a condition in any of its forms: None, a tensor, a list of tensors, or a dictionary."""
        if cond is None:
            return self(x, t)
        if not isinstance(cond, dict):
            cond = cond if isinstance(cond, list) else [cond]
            cond = {"c_concat" if self.conditioning_key == "concat" else "c_crossattn": cond}
        return self(x, t, **cond)


class DDPM(NoiseSchedule, DiffusionTrainer):
    """Denoising diffusion on images [B, C, H, W] in [-1, 1] (Ho et al., 2020).

    The loss of a sample is the mean squared (or absolute) error of the network's output against the noise, x_0 or
    v (`parameterization`), with an optional learned log variance a timestep and a share of the variational bound.

    Args:
        unet_config: the network. conditioning_key: see `DiffusionWrapper`.
        timesteps: how many there are. beta_schedule: linear, sqrt_linear, sqrt or cosine.
        linear_start, linear_end: its first and last noise variance. cosine_s: the offset of the cosine one.
        given_betas: the noise variances themselves, in place of a schedule.
        parameterization: what the network predicts: `eps` (the noise), `x0` (the image) or `v`.
        loss_type: l2 or l1. l_simple_weight, original_elbo_weight: weights of this loss, and of the variational bound.
        learn_logvar, logvar_init: a log variance a timestep that weighs the loss: whether it is trained, and its start.
        v_posterior: the share of beta in the posterior's variance; 0 is the variance of the true posterior.
        image_size: side of what is drawn (latents of a latent model). channels: of it.
        clip_denoised: sampling by all timesteps keeps the image in [-1, 1]. log_every_t: unused.
        use_positional_encodings: unused.
        ckpt_path: weights to begin with, without keys that begin with one of `ignore_keys`.
        load_only_unet: of these, take the network's alone.
        use_ema: keep an average of the network's weights. ema_decay: of that average.
        min_snr_gamma: weigh timesteps by min-SNR with this gamma (Hang et al., 2023, use 5); None weighs them equally.
        evaluate_ema: validation also scores the averaged weights, and sample pictures are drawn with them.
    """

    def __init__(
        self,
        unet_config: Any,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = None,
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int | Sequence[int] = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Any = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        noise_config: Any = None,
        ema_decay: float = 0.9999,
        min_snr_gamma: float | None = None,
        evaluate_ema: bool = True,
    ) -> None:
        super().__init__(first_stage_key, monitor, scheduler_config, noise_config)
        if loss_type not in ("l1", "l2"):
            raise UserError(f"yaml: loss_type: '{loss_type}' is neither l1 nor l2")
        self.parameterization = parameterization
        self.v_posterior = v_posterior
        self.loss_type = loss_type
        self.image_size, self.channels = image_size, channels
        self.log_every_t, self.clip_denoised = log_every_t, clip_denoised
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise UserError(f"yaml: min_snr_gamma is {min_snr_gamma!r}; it must be a number above 0, or null")
        weights = torch.ones(self.num_timesteps) if min_snr_gamma is None else self.min_snr_weights(min_snr_gamma)
        self.register_buffer("timestep_weights", weights, persistent=False)
        self.learn_logvar = learn_logvar
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        if use_ema:
            self.average_weights(ema_decay, evaluate_ema)
        self.build_stages()
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def build_stages(self) -> None:
        """Hook for subclasses whose submodules must exist before a checkpoint is read."""

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a file, without keys that begin with one of `ignore_keys`."""
        from ldm.checkpoint import load_into

        load_into(self.model if only_model else self, path, ignore_keys=ignore_keys)

    def add_noise(
        self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, random: Randomness | None = None
    ) -> torch.Tensor:
        """What the network sees: x_start [B, C, H, W] at timesteps t [B], with `noise_config`'s input perturbation."""
        if self.training:
            noise = self.draw.perturb(noise, random or GlobalRandom(len(noise), noise.device))
        return self.q_sample(x_start, t, noise)

    # ---- loss -------------------------------------------------------------------------------------------------

    def get_loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss a sample, [B]: the mean over everything else."""
        loss = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)

    def weigh_loss(self, loss: torch.Tensor, t: torch.Tensor, prefix: str) -> tuple[torch.Tensor, dict]:
        """The scalar training loss from a loss a sample [B] at timesteps t [B], and what to log."""
        logs = {f"{prefix}/loss_simple": loss.mean().detach()}
        loss = loss * self.timestep_weights[t]
        logvar = self.logvar[t]
        total = self.l_simple_weight * (loss / torch.exp(logvar) + logvar).mean()
        if self.learn_logvar:
            logs[f"{prefix}/loss_gamma"] = total.detach()
            logs["logvar"] = self.logvar.detach().mean()
        if self.original_elbo_weight:
            vlb = (self.lvlb_weights[t] * loss).mean()
            logs[f"{prefix}/loss_vlb"] = vlb.detach()
            total = total + self.original_elbo_weight * vlb
        logs[f"{prefix}/loss"] = total.detach()
        return total, logs

    def p_losses(
        self,
        x_start: torch.Tensor,
        cond: Conditioning,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        random: Randomness | None = None,
    ) -> tuple[torch.Tensor, dict]:
        """Scalar loss and logs for clean samples x_start [B, C, H, W] at timesteps t [B]."""
        noise = self.draw_noise(x_start, random) if noise is None else noise
        prediction = self.apply_model(self.add_noise(x_start, t, noise, random), t, cond)
        loss = self.get_loss(prediction, self.training_target(x_start, noise, t))
        return self.weigh_loss(loss, t, "train" if self.training else "val")

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning = None) -> torch.Tensor:
        """The network's raw output [B, C, H, W] for noisy samples, timesteps t [B] and a condition.

        `cond` is None, a tensor, a list of tensors, or {"c_concat": [...], "c_crossattn": [...]}.
        """
        return self.model.predict(x_noisy, t, cond)

    def forward(
        self, x: torch.Tensor, c: Conditioning = None, random: Randomness | None = None
    ) -> tuple[torch.Tensor, dict]:
        """The loss of clean samples `x` at random timesteps."""
        random = random or GlobalRandom(len(x), x.device)
        t = random.randint(self.num_timesteps).to(x.device)
        return self.p_losses(x, c, t, random=random)

    def shared_step(self, batch: dict, random: Randomness | None = None) -> tuple[torch.Tensor, dict]:
        """Loss and logs of a batch."""
        return self(self.get_input(batch, self.first_stage_key), random=random)

    @torch.no_grad()
    def sample(self, batch_size: int = 16, steps: int | None = None, **options: Any) -> torch.Tensor:
        """Unconditional samples [B, C, H, W] by ancestral sampling (all timesteps unless `steps` says fewer).

        `options` go to the sampler, such as `generator`.
        """
        from ldm.models.diffusion.ddim import DDIMSampler

        size = self.image_size if isinstance(self.image_size, Sequence) else (self.image_size,) * 2
        samples, _ = DDIMSampler(self).sample(
            steps or self.num_timesteps,
            batch_size,
            (self.channels, *size),
            eta=1.0,
            verbose=False,
            show_progress=False,
            **options,
        )
        return samples

    @torch.no_grad()
    def log_images(
        self, batch: dict, N: int = 8, ddim_steps: int = 50, seed: int = 0, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Pictures in [-1, 1] for the log: inputs, and samples from the noises of `seed`, seed + 1, ..."""
        x = self.get_input(batch, self.first_stage_key)[:N].to(self.device)
        options = dict(generator=noises(seed, len(x)), callback=abandon_pictures)
        with self.evaluation_scope():
            return {"inputs": x, "samples": self.sample(len(x), min(ddim_steps, self.num_timesteps), **options)}
