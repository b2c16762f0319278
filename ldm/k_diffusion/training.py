"""Training a diffusion model of pixels over continuous noise levels (Karras et al., 2022), without a condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ldm.adamw import AdamW
from ldm.errors import UserError
from ldm.k_diffusion import densities
from ldm.k_diffusion.augmentation import CONDITIONS, Augmentation, AugmentWrapper
from ldm.k_diffusion.denoiser import Denoiser, DenoiserWithVariance
from ldm.k_diffusion.pixels import PixelSampler
from ldm.models.diffusion.trainer import DiffusionTrainer, noises
from ldm.modules.randomness import GlobalRandom, Randomness
from ldm.signals import abandon_pictures
from ldm.util import instantiate_from_config

OPTIMIZERS = {"adamw": AdamW, "sgd": torch.optim.SGD}


class KarrasDiffusion(DiffusionTrainer):
    """A denoiser of images [B, C, H, W] in [-1, 1], trained at random noise levels.

    Args:
        unet_config: the network, such as `ldm.k_diffusion.models.image_v1.ImageDenoiserModelV1`.
        image_size: pixels of the images' side. channels: of the images; 1 takes the mean of coloured ones.
        sigma_data, weighting: see `Denoiser`. sigma_min, sigma_max: noise levels that samples end and start at.
        sigma_density: how often training sees each noise level; see `ldm.k_diffusion.densities`.
        stratified: spread the noise levels of a batch evenly; a sample's then depends on the batch's size.
        augment_prob: probability of each of `Augmentation`'s operations; None for a network that knows of none.
        optimizer_config: {type: adamw or sgd, and what torch's optimiser takes}, for `base_learning_rate`.
        use_ema: average the weights. ema_decay: the most that the average's decay is.
        ema_config: how that rises, see `ldm.modules.ema.InverseWarmUp`; None for (1 + n) / (10 + n).
        ckpt_path: weights to start from, without keys that begin with one of `ignore_keys`.
        grow_from: those of a smaller network, see `ldm.k_diffusion.growing`.
        monitor, scheduler_config, noise_config, first_stage_key: see `DiffusionTrainer`.

    Raises:
        UserError: a parameter is out of its range.
    """

    def __init__(
        self,
        unet_config: Any,
        image_size: int,
        channels: int = 3,
        sigma_data: float = 0.5,
        sigma_min: float = 1e-2,
        sigma_max: float = 80.0,
        sigma_density: Any = None,
        weighting: str = "karras",
        stratified: bool = False,
        augment_prob: float | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        use_ema: bool = True,
        ema_decay: float = 0.9999,
        ema_config: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        grow_from: str | None = None,
        monitor: str | None = None,
        scheduler_config: Any = None,
        noise_config: Any = None,
        first_stage_key: str = "image",
    ) -> None:
        super().__init__(first_stage_key, monitor, scheduler_config, noise_config)
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"yaml: sigma_min {sigma_min} and sigma_max {sigma_max}: needs 0 < sigma_min < sigma_max")
        if ckpt_path is not None and grow_from is not None:
            raise UserError("yaml: ckpt_path and grow_from exclude each other: weights start from one file")
        self.image_size, self.channels = image_size, channels
        self.sigma_min, self.sigma_max, self.stratified = sigma_min, sigma_max, stratified
        self.density = densities.LogNormal() if sigma_density is None else instantiate_from_config(sigma_density)
        self.augment = None if augment_prob is None else Augmentation(augment_prob)
        self.optimizer_config = dict(optimizer_config or {})
        kind = self.optimizer_config.get("type", "adamw")
        if kind not in OPTIMIZERS:
            raise UserError(f"yaml: optimizer_config: type is {kind!r}; it may be {' or '.join(OPTIMIZERS)}")
        network = self.build_network(unet_config)
        step = getattr(network, "reduction", 1)
        if image_size < 2 * step or image_size % step:
            raise UserError(
                f"yaml: image_size is {image_size}; for this unet_config it must be {2 * step}, {3 * step}, ..."
            )
        kind = DenoiserWithVariance if getattr(network, "has_variance", False) else Denoiser
        self.model = kind(network if self.augment is None else AugmentWrapper(network), sigma_data, weighting)
        if grow_from is not None:
            from ldm.k_diffusion.growing import grow

            grow(network, grow_from)
        if use_ema:
            warm_up = {"target": "ldm.modules.ema.InverseWarmUp", "params": ema_config}
            settings = {} if ema_config is None else {"warm_up": instantiate_from_config(warm_up)}
            self.average_weights(ema_decay, **settings)
        if ckpt_path is not None:
            from ldm.checkpoint import load_into

            load_into(self, ckpt_path, ignore_keys=ignore_keys)

    def build_network(self, unet_config: Any) -> nn.Module:
        """The network, with a place for augmentation's numbers if there is augmentation.

        Raises:
            UserError: it wants a condition, which there is none of.
        """
        params = unet_config.get("params") or {}
        for name in ("unet_cond_dim", "cross_cond_dim"):
            if params.get(name):
                raise UserError(f"yaml: unet_config: {name} is {params[name]}; models are trained without a condition")
        if self.augment is None:
            return instantiate_from_config(unet_config)
        others = params.get("mapping_cond_dim") or 0
        return instantiate_from_config(unet_config, mapping_cond_dim=others + CONDITIONS)

    # ---- loss -------------------------------------------------------------------------------------------------

    def get_input(self, batch: dict, key: str) -> torch.Tensor:
        images = super().get_input(batch, key)
        if self.channels == 1 and images.shape[1] > 1:
            images = images.mean(dim=1, keepdim=True)
        if images.shape[1:] != (self.channels, self.image_size, self.image_size):
            height, width = images.shape[2:]
            raise UserError(
                f"data: images have {images.shape[1]} channels and {width}x{height} pixels, but the model is for "
                f"{self.channels} and {self.image_size}x{self.image_size}"
            )
        return images

    def draw_sigma(self, random: Randomness) -> torch.Tensor:
        """A noise level for each sample of this process's batch."""
        u = random.rand().double()
        if self.stratified and self._trainer is not None:
            u = densities.strata(u, self.global_rank, self.trainer.world_size)
        elif self.stratified:
            u = densities.strata(u)
        return self.density(u).to(self.device)

    def shared_step(self, batch: dict, random: Randomness | None = None) -> tuple[torch.Tensor, dict]:
        """Loss and logs of a batch of images."""
        x_start, conditions = self.get_input(batch, self.first_stage_key), {}
        random = random or GlobalRandom(len(x_start), x_start.device)
        if self.training and self.augment is not None:
            x_start, conditions["aug_cond"] = self.augment(x_start, random)
        sigma, noise = self.draw_sigma(random), self.draw_noise(x_start, random)
        seen = self.draw.perturb(noise, random) if self.training else noise
        loss = self.model.loss(x_start, noise, sigma, seen, **conditions).mean()
        return loss, {f"{'train' if self.training else 'val'}/loss": loss.detach()}

    def make_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        settings = dict(self.optimizer_config)
        kind = OPTIMIZERS[settings.pop("type", "adamw")]
        network = self.model.inner_model if self.augment is None else self.model.inner_model.inner_model
        groups = getattr(network, "param_groups", lambda: (self.trainable_parameters(), []))()
        decayed, others = ({"params": parameters} for parameters in groups)
        if "betas" in settings:
            settings["betas"] = tuple(settings["betas"])
        try:
            return kind([decayed, others | {"weight_decay": 0.0}], lr=self.learning_rate, fused=fused, **settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"yaml: optimizer_config: {' '.join(str(error).split())}") from error

    # ---- samples ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        generators: Sequence[torch.Generator],
        how: PixelSampler | None = None,
        callback: Callable[..., None] | None = None,
    ) -> torch.Tensor:
        """Images [B, C, H, W] of about [-1, 1], one for each of the generators; `callback` is called every step."""
        shape = (self.channels, self.image_size, self.image_size)
        levels = self.sigma_min, self.sigma_max
        return (how or PixelSampler()).draw(self.model, shape, generators, self.device, *levels, callback)

    @torch.no_grad()
    def log_images(
        self, batch: dict, N: int = 8, seed: int = 0, sampling: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Pictures in [-1, 1] for the log: inputs, and samples from the noises of `seed`, seed + 1, ...

        Args:
            sampling: how samples are drawn, see `PixelSampler`.
        """
        x = self.get_input(batch, self.first_stage_key)[:N].to(self.device)
        with self.evaluation_scope():
            samples = self.sample(noises(seed, N), PixelSampler.of(sampling), abandon_pictures)
        return {"inputs": x, "samples": samples}
