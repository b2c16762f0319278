"""Latent diffusion (Rombach et al., 2022): DDPM (base.py) in an autoencoder's latent space, with a condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.models.diffusion.base import DDPM, DiffusionWrapper
from ldm.models.diffusion.trainer import noises
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.randomness import GlobalRandom, Randomness, drop_captions
from ldm.signals import abandon_pictures
from ldm.util import UserError, disabled_train, instantiate_from_config

__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion", "LatentInpaintDiffusion"]


class LatentDiffusion(DDPM):
    """Diffusion in the latent space of a frozen autoencoder, with a condition (Rombach et al., 2022).

    Args beyond DDPM's:
        first_stage_config, cond_stage_config: yaml sections; the condition's `__is_first_stage__` reuses the
            autoencoder and `__is_unconditional__` means none.
        cond_stage_key: the batch entry that holds the condition. cond_stage_trainable: train its encoder too.
        cond_stage_forward: the method of the condition's encoder that is called, in place of `encode`.
        conditioning_key: as DDPM's, but None is `concat`, or `crossattn` without `concat_mode`.
        num_timesteps_cond: only 1 is known.
        scale_factor: latents are multiplied by it. scale_by_std: `scale_factor` is set to
            1 / std of the first batch's latents, unless a checkpoint brought another value than 1.
        ucg_training: {batch key: {p: 0.1, val: ""}}: how often a caption is replaced, for guidance; a class label is
            replaced by the class that `val` names.
    """

    def __init__(
        self,
        first_stage_config: Any,
        cond_stage_config: Any,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        ucg_training: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__":
            conditioning_key = None
        self.stage_configs = (first_stage_config, cond_stage_config)
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        self.cond_stage_forward = cond_stage_forward
        self.num_timesteps_cond = num_timesteps_cond or 1
        self.scale_by_std, self._scale_factor = scale_by_std, float(scale_factor)
        self.ucg_training = dict(ucg_training or {})
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        self.clip_denoised = False  # latents have no bounds

    def build_stages(self) -> None:
        first_stage_config, cond_stage_config = self.stage_configs
        if self.scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(self._scale_factor))
        else:
            self.scale_factor = self._scale_factor
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        if cond_stage_config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            freeze(self.cond_stage_model)

    # ---- first stage ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_first_stage(self, x: torch.Tensor) -> Any:
        """The autoencoder's encoding of images [B, 3, H, W] in [-1, 1]: a distribution, or a tensor."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, posterior: Any, random: Randomness | None = None) -> torch.Tensor:
        """Scaled latents [B, C, H/f, W/f]: a draw from a posterior, or a tensor as it is."""
        if isinstance(posterior, DiagonalGaussianDistribution):
            mean = posterior.mean
            random = random or GlobalRandom(len(mean), mean.device)
            posterior = mean + posterior.std * random.randn_like(mean)
        elif not isinstance(posterior, torch.Tensor):
            raise NotImplementedError(f"encoding of type {type(posterior).__name__}")
        return self.scale_factor * posterior

    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] of about [-1, 1] from scaled latents."""
        return self.first_stage_model.decode(z / self.scale_factor)

    @torch.no_grad()
    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        """With scale_by_std, make the first batch's latents of unit standard deviation."""
        if not self.scale_by_std or float(self.scale_factor) != 1.0:  # set before, or loaded
            return
        z = self.get_latents(batch)
        if self._trainer is not None and self.trainer.world_size > 1:
            z = self.all_gather(z)
        self.scale_factor.copy_(1.0 / z.flatten().std())
        print(f"scale_by_std: latents have a standard deviation of {z.std():.4f}; scale_factor {self.scale_factor:.4f}")

    # ---- condition --------------------------------------------------------------------------------------------

    def get_learned_conditioning(self, c: Any) -> Any:
        """The condition's encoding: tokens [B, T, D] for captions."""
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        c = encode(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = "") -> Any:
        """The encoding of the empty caption (or of `null_label`), for guidance."""
        return self.get_learned_conditioning(batch_size * [null_label])

    def complete_condition(self, c: Any, batch: dict, random: Randomness | None = None) -> Any:
        """The encoded condition `c` with what else of the batch the network sees; here nothing."""
        return c

    def get_condition(self, batch: dict, random: Randomness | None = None) -> Any:
        """The raw condition of a batch, some of it replaced as `ucg_training` says."""
        if self.cond_stage_key not in batch:
            raise UserError(f"data: the samples hold {', '.join(batch)}, but cond_stage_key is '{self.cond_stage_key}'")
        value = batch[self.cond_stage_key]
        rule = self.ucg_training.get(self.cond_stage_key) if self.training and random is not None else None
        if self.cond_stage_key in ("class_label", "cls"):
            return {**batch, self.cond_stage_key: drop_labels(value, random, rule)} if rule else batch
        if isinstance(value, torch.Tensor):
            return value.permute(0, 3, 1, 2).contiguous().float() if value.ndim == 4 else value
        if rule:
            value = drop_captions(value, random, rule["p"], rule.get("val") or "")
        return list(value)

    def conditions_of(self, prompts: Sequence[str | int], batch: dict) -> Any:
        """Raw conditions like those of `batch`: captions, or class labels."""
        if self.model.conditioning_key in ("concat", "hybrid"):  # the rest of the condition comes from the batch
            prompts = prompts[: self.batch_size_of(batch)]
        value = batch[self.cond_stage_key]
        if not isinstance(value, torch.Tensor):
            return [str(prompt) for prompt in prompts]
        return {**batch, self.cond_stage_key: torch.tensor([int(prompt) for prompt in prompts], device=value.device)}

    # ---- training ---------------------------------------------------------------------------------------------

    def get_latents(self, batch: dict, random: Randomness | None = None) -> torch.Tensor:
        """Scaled latents of a batch: from images, or from posterior moments computed before (`moments`)."""
        if "moments" in batch:
            posterior = DiagonalGaussianDistribution(batch["moments"])
        else:
            posterior = self.encode_first_stage(DDPM.get_input(self, batch, self.first_stage_key))
        return self.get_first_stage_encoding(posterior, random).detach()

    def get_input(self, batch: dict, key: str, random: Randomness | None = None) -> list:
        """[latents, encoded or raw condition] of a batch; the condition is raw when its encoder is trained."""
        z = self.get_latents(batch, random)
        if self.model.conditioning_key is None:
            return [z, None]
        c = self.get_condition(batch, random)
        if not self.cond_stage_trainable and self.cond_stage_model is not None:
            c = self.get_learned_conditioning(c)
        return [z, c]

    def shared_step(self, batch: dict, random: Randomness | None = None) -> tuple[torch.Tensor, dict]:
        z, c = self.get_input(batch, self.first_stage_key, random)
        return self(z, c, random)

    def forward(self, x: torch.Tensor, c: Any = None, random: Randomness | None = None) -> tuple[torch.Tensor, dict]:
        """The loss of latents `x` under condition `c` (raw when the condition's encoder is trained)."""
        if c is not None and self.cond_stage_trainable:
            c = self.get_learned_conditioning(c)
        return super().forward(x, c, random)

    @torch.no_grad()
    def log_images(
        self,
        batch: dict,
        N: int = 8,
        ddim_steps: int = 50,
        ddim_eta: float = 0.0,
        unconditional_guidance_scale: float = 3.0,
        prompts: Sequence[str | int] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Pictures in [-1, 1] for the log: inputs, reconstructions, captions, samples without and with guidance.

        Samples are of the batch's own conditions, or of `prompts` (captions, or class labels), and start from the
        noises of the seeds `seed`, seed + 1, ...
        """
        from ldm.models.diffusion.ddim import DDIMSampler
        from ldm.modules.pictures import log_txt_as_img

        batch = {k: v[:N] for k, v in batch.items()}
        z = self.get_latents(batch)
        logs = {"reconstruction": self.decode_first_stage(z)}
        if self.first_stage_key in batch:
            logs = {"inputs": DDPM.get_input(self, batch, self.first_stage_key), **logs}
        raw = self.get_condition(batch) if self.model.conditioning_key else None
        if prompts and raw is not None:
            raw = self.conditions_of(prompts, batch)
        count = len(raw[self.cond_stage_key] if isinstance(raw, dict) else z if raw is None else raw)
        c = None if raw is None else self.complete_condition(self.get_learned_conditioning(raw), batch)
        captions = isinstance(raw, list) and isinstance(raw[0], str)
        if captions:
            logs["conditioning"] = log_txt_as_img(logs["reconstruction"].shape[2:], raw)

        def draw(**guidance: Any) -> torch.Tensor:
            samples, _ = DDIMSampler(self).sample(
                min(ddim_steps, self.num_timesteps),
                count,
                z.shape[1:],
                c,
                eta=ddim_eta,
                verbose=False,
                show_progress=False,
                generator=noises(seed, count),
                callback=abandon_pictures,
                **guidance,
            )
            return self.decode_first_stage(samples)

        with self.evaluation_scope():
            logs["samples"] = draw()
            if captions and unconditional_guidance_scale != 1.0:
                logs[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = draw(
                    unconditional_guidance_scale=unconditional_guidance_scale,
                    unconditional_conditioning=self.complete_condition(
                        self.get_unconditional_conditioning(count), batch
                    ),
                )
        return logs


class LatentInpaintDiffusion(LatentDiffusion):
    """Latent diffusion that also sees the mask and the masked image's latents (Stable Diffusion for inpainting).

    Args beyond LatentDiffusion's:
        concat_keys: the batch entries that are laid beside the noisy latents, in this order; each is
            [B, H, W, C], or [B, H, W] for one channel, and masks are 1 where to paint.
        masked_image_key: which of them is an image, to be encoded; the others are resized to the latents.
        finetune_keys: weights that may come with fewer input channels from `ckpt_path`, that is from a model that does
            not inpaint; the new channels start at zero, so that training goes on from what that model draws.

    Raises:
        UserError: conditioning_key is not `hybrid` or `concat`.
    """

    FIRST_LAYER = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")

    def __init__(
        self,
        *args: Any,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        finetune_keys: Sequence[str] | None = FIRST_LAYER,
        **kwargs: Any,
    ) -> None:
        self.finetune_keys = tuple(finetune_keys or ())
        super().__init__(*args, **kwargs)
        if self.model.conditioning_key not in ("hybrid", "concat"):
            raise UserError("yaml: conditioning_key: LatentInpaintDiffusion needs hybrid (or concat)")
        self.concat_keys, self.masked_image_key = tuple(concat_keys), masked_image_key

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a file; those of `finetune_keys` may have fewer input channels there."""
        from ldm.checkpoint import apply_state_dict, read_state_dict, restart_ema

        own, state = self.state_dict(), read_state_dict(path)
        narrow = [k for k in self.finetune_keys if k in state and k in own and state[k].shape[1] < own[k].shape[1]]
        if not narrow:
            return super().init_from_ckpt(path, ignore_keys, only_model)
        for key in narrow:
            missing = own[key].shape[1] - state[key].shape[1]
            state[key] = F.pad(state[key], (0, 0, 0, 0, 0, missing))
        report = apply_state_dict(self.model if only_model else self, state, path, ignore_keys=ignore_keys)
        if self.use_ema and (only_model or any(key.startswith("model_ema.") for key in report.missing)):
            restart_ema(self)
        said = f"Loaded {path}, of a model that does not inpaint: {missing} input channels are new and start at zero"
        print("\n  ".join([said, *report.notable().lines()]))

    @torch.no_grad()
    def get_concat(self, batch: dict, random: Randomness | None = None) -> torch.Tensor:
        """What is laid beside the noisy latents [B, C, h, w]: the mask and the masked image's latents."""
        lacking = [key for key in self.concat_keys if key not in batch]
        if lacking:
            raise UserError(f"data: the samples hold {', '.join(batch)}, but concat_keys has '{lacking[0]}'")
        entries = {key: DDPM.get_input(self, batch, key).to(self.device) for key in self.concat_keys}
        latents = self.encode_first_stage(entries[self.masked_image_key])
        latents = self.get_first_stage_encoding(latents, random)
        parts = [
            latents if key == self.masked_image_key else F.interpolate(entry, size=latents.shape[2:])
            for key, entry in entries.items()
        ]
        return torch.cat(parts, dim=1)

    def complete_condition(self, c: Any, batch: dict, random: Randomness | None = None) -> dict[str, list]:
        """The encoded (or raw) caption, mask and masked image."""
        condition = {"c_concat": [self.get_concat(batch, random)]}
        return condition | ({"c_crossattn": [c]} if self.model.conditioning_key == "hybrid" else {})

    def get_input(self, batch: dict, key: str, random: Randomness | None = None) -> list:
        """[latents, {c_concat, c_crossattn}] of a batch; the caption is raw when its encoder is trained."""
        z, c = super().get_input(batch, key, random)
        return [z, self.complete_condition(c, batch, random)]

    def forward(self, x: torch.Tensor, c: Any = None, random: Randomness | None = None) -> tuple[torch.Tensor, dict]:
        """The loss of latents `x` under condition `c` (with a raw caption when its encoder is trained)."""
        if self.cond_stage_trainable and "c_crossattn" in c:
            c = {**c, "c_crossattn": [self.get_learned_conditioning(c["c_crossattn"][0])]}
        return DDPM.forward(self, x, c, random)


def drop_labels(labels: Any, random: Randomness, rule: Any) -> torch.Tensor:
    """Class labels [B], each replaced by the class `val` with probability `p`, as `rule` says.

    Raises:
        UserError: the rule names no class.
    """
    if not isinstance(rule.get("val"), int):
        raise UserError("yaml: ucg_training: a class label needs `val:`, the number of the class that stands for none")
    labels = torch.as_tensor(labels)
    return torch.where((random.rand() < rule["p"]).to(labels.device), rule["val"], labels)


def freeze(model: nn.Module) -> nn.Module:
    """`model` in eval mode for good, its parameters without gradients."""
    model.eval().requires_grad_(False)
    model.train = disabled_train.__get__(model)
    return model
