"""DreamBooth (Ruiz et al., 2023) with adapters (Xiang et al., 2023): a few photos of one subject, and prior images."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ldm.adamw import AdamW
from ldm.models.diffusion import ddpm
from ldm.modules import adapters, lora
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.randomness import GlobalRandom, Randomness, sample_seed
from ldm.signals import abandon_pictures
from ldm.util import UserError, instantiate_from_config

TRAIN_LEVELS = ("adapter", "lora", "embeder", "text", "unet")
OPTIMIZERS = ("adamw", "adamw8bit")


class LatentDiffusion(ddpm.LatentDiffusion):
    """Latent diffusion of which a part is trained on instance and prior images together.

    Batches are {"instance": {...}, "prior": {...}}, the prior optional; both go through the U-Net in one pass, and
    loss = instance loss + reg_weight * prior loss.

    Args beyond LatentDiffusion's:
        reg_weight: weight of the prior images' loss.
        train_level: what is trained, one or several: `adapter`, `lora`, `embeder` (textual inversion), `text` (the text
            encoder), `unet`. Nothing else gets gradients, whatever cond_stage_trainable says, and what frozen parts
            compute is computed once.
        lora_config: see `ldm.modules.lora.LoraConfig`.
        personalization_config: yaml of the `EmbeddingManager`, with the new words of textual inversion.
        embedding_manager_ckpt: a file with vectors that they start as.
        lr_factors: of the learning rate, by level, e.g. `{embeder: 5}`.
        use_ema: average what is trained. cond_stage_trainable: unused.
        optimizer: `adamw`, or `adamw8bit` with the package bitsandbytes.
    """

    def __init__(
        self,
        *args: Any,
        reg_weight: float = 1.0,
        train_level: Sequence[str] = ("adapter",),
        cond_stage_trainable: bool = False,
        use_ema: bool = False,
        lora_config: Any = None,
        personalization_config: Any = None,
        embedding_manager_ckpt: str = "",
        lr_factors: Mapping[str, float] | None = None,
        optimizer: str = "adamw",
        **kwargs: Any,
    ) -> None:
        levels = [train_level] if isinstance(train_level, str) else list(train_level)
        if not levels or set(levels) - set(TRAIN_LEVELS):
            raise UserError(f"yaml: model.params.train_level holds {levels}; it may hold {', '.join(TRAIN_LEVELS)}")
        if {"lora", "unet"} <= set(levels):
            raise UserError("yaml: model.params.train_level: lora is an addition to a U-Net that stays; leave unet out")
        if not isinstance(reg_weight, (int, float)) or reg_weight < 0:
            raise UserError(f"yaml: model.params.reg_weight holds {reg_weight!r}; it must be a number of at least 0")
        self.train_level, self.reg_weight = levels, float(reg_weight)
        self.lora_config = lora.LoraConfig.read(lora_config) if "lora" in levels else None
        if self.lora_config is not None and self.lora_config.text_targets and "text" in levels:
            raise UserError("yaml: model.params.lora_config.text_targets: train_level has text; leave one of them out")
        self.personalization_config, self.embedding_manager_ckpt = personalization_config, embedding_manager_ckpt
        self.lr_factors, self.optimizer = _read_factors(lr_factors), optimizer
        check_optimizer(optimizer)
        self.contexts: dict[str, torch.Tensor] = {}
        self.yaml_params = {key: kwargs.get(key) for key in ("unet_config", "cond_stage_config")}  # names of layers
        super().__init__(*args, cond_stage_trainable=False, use_ema=use_ema, **kwargs)

    def build_stages(self) -> None:
        super().build_stages()
        self.embedding_manager: EmbeddingManager | None = None
        if "embeder" in self.train_level:
            section = self.personalization_config or {"target": "ldm.modules.embedding_manager.EmbeddingManager"}
            self.embedding_manager = instantiate_from_config(section, embedder=self.cond_stage_model)
        self.prepared = False
        self.choose_trained()

    def choose_trained(self) -> None:
        """Give gradients to what `train_level` names, and to nothing else."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(level_of(name) in self.train_level)
        if self.use_ema:  # made anew, without copies of what is frozen
            self.model_ema = LitEma(self.model, decay=float(self.model_ema.decay))

    def prepare(self) -> None:
        """Put in what is made beside the base model's weights, which are there by now: LoRA, and the new words."""
        if self.prepared:
            return
        self.prepared = True
        if self.lora_config is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sample_seed(self.seed, "lora"))
                lora.inject(self.model.diffusion_model, self.lora_config)
                if targets := self.lora_config.text_targets:
                    lora.inject(text_transformer(self.cond_stage_model), self.lora_config, targets)
            self.choose_trained()
        if self.embedding_manager is not None:
            self.embedding_manager.initialise()
            if self.embedding_manager_ckpt:
                self.embedding_manager.load(self.embedding_manager_ckpt)

    def setup(self, stage: str) -> None:
        self.prepare()
        super().setup(stage)

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
        trained = sum(p.numel() for p in self.trainable_parameters())
        whole = sum(p.numel() for n, p in self.named_parameters() if level_of(n) == "unet")
        if self.trainer.is_global_zero:
            share = trained / whole
            print(f"Trains {trained:,} parameters ({' and '.join(self.train_level)}), {share:.3%} of the U-Net's")

    def trainable_parameters(self) -> list[nn.Parameter]:
        if "adapter" in self.train_level and not list(self.model.diffusion_model.adapter_parameters()):
            raise UserError("yaml: train_level holds adapter, but unet_config has no adapter_config")
        return super().trainable_parameters()

    def make_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        """AdamW, by a fused implementation or in 8 bits, with a learning rate for each level that has a factor."""
        groups: dict[float, list[nn.Parameter]] = {}
        self.trainable_parameters()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self.lr_factors.get(level_of(name), 1.0), []).append(parameter)
        settings = [{"params": found, "lr": factor * self.learning_rate} for factor, found in groups.items()]
        if self.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(settings, lr=self.learning_rate)
        return AdamW(settings, lr=self.learning_rate, fused=fused)

    @property
    def strict_loading(self) -> bool:
        """Checkpoints hold the whole model only where the U-Net is trained, else what was trained."""
        return "unet" in self.train_level

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leave frozen weights out of checkpoints: they are in the base model's file."""
        super().on_save_checkpoint(checkpoint)
        if not self.strict_loading:
            trained = {name for name, value in self.state_dict(keep_vars=True).items() if value.requires_grad}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if k in trained or k.startswith("model_ema.")}

    def encoding_changes(self, text: str) -> bool:
        """Whether training changes what the text encoder makes of `text`."""
        if "text" in self.train_level or (self.lora_config is not None and self.lora_config.text_targets):
            return True
        return self.embedding_manager is not None and self.embedding_manager.mentions(text)

    def get_learned_conditioning(self, c: Any) -> Any:
        """The captions' encoding; of each different caption once, and only once at all where training leaves it."""
        if not (isinstance(c, (list, tuple)) and all(isinstance(text, str) for text in c)):
            return super().get_learned_conditioning(c)
        different = list(dict.fromkeys(c))
        changing = [text for text in different if self.encoding_changes(text)]
        encoded: dict[str, torch.Tensor] = {}
        if changing:
            encoded = dict(zip(changing, super().get_learned_conditioning(changing).split(1), strict=True))
        for text in different:
            if text in encoded:
                continue
            known = self.contexts.get(text)
            if known is None or known.device != self.device:
                with torch.inference_mode(False), torch.no_grad():  # it is kept, and trained with
                    self.contexts[text] = super().get_learned_conditioning([text])
            encoded[text] = self.contexts[text]
        return torch.cat([encoded[text] for text in c])

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
        own_captions: bool = True,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Pictures in [-1, 1]: photos as the autoencoder shows them, and samples of both captions (DPM-Solver++).

        With `prompts`, samples of these too, or of these alone without `own_captions`; all from the noises of the
        seeds `seed`, seed + 1, ...
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
            logs[name] = self.decode_first_stage(z)
            if own_captions:
                logs[f"{name}_samples"] = draw(list(part[self.cond_stage_key]), z.shape[1:])
        return logs | ({"prompts_samples": draw(list(prompts), z.shape[1:])} if prompts else {})


def level_of(name: str) -> str | None:
    """The level of `TRAIN_LEVELS` that a parameter of the model belongs to; None for the autoencoder's."""
    if ".lora_A." in name or ".lora_B." in name:
        return "lora"
    if adapters.is_adapter_key(name):
        return "adapter"
    parts = {"embedding_manager": "embeder", "cond_stage_model": "text", "model": "unet"}
    return parts.get(name.partition(".")[0])


def text_transformer(encoder: nn.Module) -> nn.Module:
    """transformers' text encoder inside of `FrozenCLIPEmbedder`.

    Raises:
        UserError: the encoder is another.
    """
    if not hasattr(encoder, "transformer") or not hasattr(encoder.transformer, "get_input_embeddings"):
        raise UserError(
            f"yaml: model.params.lora_config.text_targets: {type(encoder).__name__} takes no LoRA; leave them out"
        )
    return encoder.transformer


def check_optimizer(name: str) -> None:
    """Raise UserError unless `name` is an optimiser that is at hand."""
    if name not in OPTIMIZERS:
        raise UserError(f"yaml: model.params.optimizer: '{name}' is none of {', '.join(OPTIMIZERS)}")
    if name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "yaml: model.params.optimizer: adamw8bit needs the package bitsandbytes (pip install bitsandbytes); "
            "adamw does the same in 32 bits"
        )


def _read_factors(section: Mapping[str, float] | None) -> dict[str, float]:
    factors = dict(section or {})
    for level, factor in factors.items():
        if level not in TRAIN_LEVELS or type(factor) not in (int, float) or factor <= 0:
            raise UserError(
                f"yaml: model.params.lr_factors holds {level}: {factor!r}; it takes numbers above 0 for "
                f"{', '.join(TRAIN_LEVELS)}"
            )
    return factors
