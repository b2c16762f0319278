"""Block-wise knowledge distillation of a pruned U-Net (BK-SDM: Kim et al., 2023, arXiv:2305.15798)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from ldm.distillation.pruning import cut, feature_pairs
from ldm.models.diffusion.ddpm import DiffusionWrapper, LatentDiffusion, freeze
from ldm.modules.diffusionmodules.unet_layout import UNetLayout
from ldm.modules.randomness import Randomness
from ldm.util import UserError

PRECISIONS = {32: torch.float32, 16: torch.float16, "bf16": torch.bfloat16}


class DistilledDiffusion(LatentDiffusion):
    """Latent diffusion whose U-Net is cut out of a larger one, the teacher, and learns from it.

    loss = task + output_weight * MSE of the outputs + feature_weight * sum over stages of the MSE of their outputs
    (section 3.2). Both networks see the same noisy latents, timesteps and conditions; the stages that are compared are
    those of `pruning.feature_pairs`. With both weights 0 the student trains on the task alone, without a teacher.

    The teacher is no part of the model: it is in no checkpoint, average or optimiser, and only training reads it. To
    sample, this class is what LatentDiffusion is.

    Args beyond LatentDiffusion's:
        teacher_config: `ckpt_path`, the teacher's weights, by default those that the student was cut out of; and its
            `precision`: 32 (default), 16 or bf16. The rest of its yaml is the student's, its blocks are read from the
            weights.
        output_weight, feature_weight: of the two losses against the teacher.
    """

    def __init__(
        self,
        *args: Any,
        teacher_config: Any = None,
        output_weight: float = 1.0,
        feature_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        for name, weight in (("output_weight", output_weight), ("feature_weight", feature_weight)):
            if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
                raise UserError(f"yaml: {name} is {weight!r}; it must be a number of at least 0")
        known, given = isinstance(teacher_config, Mapping | None), teacher_config or {}
        settings = {"ckpt_path": None, "precision": 32} | (dict(given) if known else {})
        if not known or len(settings) > 2 or settings["precision"] not in list(PRECISIONS):
            raise UserError(f"yaml: teacher_config holds {given}; it may hold ckpt_path, and precision 32, 16 or bf16")
        self.teacher_path, self.teacher_precision = settings["ckpt_path"], PRECISIONS[settings["precision"]]
        if self.teacher_path and not Path(self.teacher_path).exists():
            raise UserError(f"yaml: teacher_config.ckpt_path: there is no checkpoint '{self.teacher_path}'")
        self.output_weight, self.feature_weight = float(output_weight), float(feature_weight)
        self.unet_config = kwargs["unet_config"]
        self.teacher: Teacher | None = None
        super().__init__(*args, **kwargs)

    # ---- weights ----------------------------------------------------------------------------------------------

    def start_from(self, path: str) -> None:
        """Begin with the weights that --actual_resume names, in a resumed run those that it began with.

        Raises:
            UserError: the file is not there, or cannot be read.
        """
        if not Path(path).exists():
            raise UserError(f"teacher: there is no checkpoint '{path}'; say with --actual_resume where it is now")
        self.init_from_ckpt(path)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a file; a larger U-Net's are cut to this one's, and it is the teacher unless one is named.

        Of a file with averaged weights these are taken.
        """
        from ldm.checkpoint import apply_state_dict, for_inference, read_state_dict, restart_ema

        state = read_state_dict(path)
        own, found = UNetLayout.of_params(self.unet_config["params"]), UNetLayout.of_weights(state)
        if found is None or found == own:
            return super().init_from_ckpt(path, ignore_keys, only_model)
        self.teacher_path = self.teacher_path or str(path)
        pruned = cut(for_inference(state), own, found)
        report = apply_state_dict(self.model if only_model else self, pruned, str(path), ignore_keys=ignore_keys)
        if self.use_ema:
            restart_ema(self)
        kept, whole = (sum(v.numel() for k, v in s.items() if k.startswith("model.")) for s in (pruned, state))
        said = f"Loaded {path}: {kept:,} of its U-Net's {whole:,} parameters are the student's"
        print("\n  ".join([said, *report.notable().lines()]))

    def load_teacher(self, path: str | Path) -> None:
        """Learn from the U-Net in a file, whose averaged weights are taken where it has them.

        Raises:
            UserError: the file cannot be read, or the student is not cut out of such a U-Net.
        """
        self.teacher = Teacher.load(path, self.unet_config, self.model.conditioning_key, self.teacher_precision)
        print(f"The teacher is the U-Net of {path}")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.setup_teacher()

    def setup_teacher(self) -> None:
        """Load the teacher, unless it is there or both weights are 0.

        Raises:
            UserError: nothing says which checkpoint it is, or it cannot be read.
        """
        if self.teacher is not None or not (self.output_weight or self.feature_weight):
            return
        if not self.teacher_path:
            raise UserError("--actual_resume (or yaml: teacher_config.ckpt_path): the teacher's checkpoint is missing")
        self.load_teacher(self.teacher_path)

    # ---- loss -------------------------------------------------------------------------------------------------

    def p_losses(
        self,
        x_start: torch.Tensor,
        cond: Any,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        random: Randomness | None = None,
    ) -> tuple[torch.Tensor, dict]:
        """Scalar loss and logs for clean latents x_start [B, C, h, w] at timesteps t [B]."""
        if self.teacher is None:
            return super().p_losses(x_start, cond, t, noise, random)
        noise = self.draw_noise(x_start, random) if noise is None else noise
        x_noisy = self.add_noise(x_start, t, noise, random)
        with block_outputs(self.model.diffusion_model, [here for here, _ in self.teacher.pairs]) as features:
            prediction = self.apply_model(x_noisy, t, cond)
        wanted, wanted_features = self.teacher(x_noisy, t, cond)
        prefix = "train" if self.training else "val"
        total, logs = self.weigh_loss(self.get_loss(prediction, self.training_target(x_start, noise, t)), t, prefix)
        output_loss = F.mse_loss(prediction.float(), wanted.float())
        feature_loss = sum(
            F.mse_loss(features[here].float(), wanted_features[there].float()) for here, there in self.teacher.pairs
        )
        logs |= {f"{prefix}/loss_output": output_loss.detach(), f"{prefix}/loss_features": feature_loss.detach()}
        total = total + self.output_weight * output_loss + self.feature_weight * feature_loss
        return total, logs | {f"{prefix}/loss": total.detach()}

    # ---- pictures ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_images(self, batch: dict, **settings: Any) -> dict[str, torch.Tensor]:
        """LatentDiffusion's pictures, and the teacher's samples from the same noises."""
        logs = super().log_images(batch, **settings)
        if self.teacher is None:
            return logs
        own, averaged = self.model, self.evaluate_ema
        self.model, self.evaluate_ema = self.teacher.on(self.device), False
        try:
            theirs = super().log_images(batch, **settings)
        finally:
            self.model, self.evaluate_ema = own, averaged
        return logs | {f"teacher_{name}": pictures for name, pictures in theirs.items() if name.startswith("samples")}


class Teacher:
    """A frozen U-Net beside a student's, and the pairs of blocks (student's, teacher's) whose outputs are compared.

    It is no module, so that the trainer does not take it for a part of the student.
    """

    def __init__(self, network: DiffusionWrapper, pairs: list[tuple[str, str]]) -> None:
        self.network, self.pairs = freeze(network), pairs

    @classmethod
    def load(cls, path: str | Path, unet_config: Any, conditioning_key: str | None, dtype: torch.dtype) -> Teacher:
        """The teacher in a file, for a student with that `unet_config`.

        Raises:
            UserError: the file cannot be read, or the student is not cut out of such a U-Net.
        """
        from ldm.checkpoint import apply_state_dict, empty_weights, for_inference, read_state_dict

        state = {k: v for k, v in for_inference(read_state_dict(path)).items() if k.startswith("model.")}
        found, own = UNetLayout.of_weights(state), UNetLayout.of_params(unet_config["params"])
        if found is None:
            raise UserError(f"teacher: '{path}' has no U-Net of Stable Diffusion's kind")
        pairs = feature_pairs(own, found)
        section = OmegaConf.merge(OmegaConf.create(unet_config), {"params": found.params()})
        with empty_weights():
            network = DiffusionWrapper(section, conditioning_key)
        lines = apply_state_dict(network, state, str(path), assign=True).notable().lines()
        if lines:
            raise UserError(f"teacher: '{path}' is not of unet_config, blocks aside: {'; '.join(lines[:3])}")
        return cls(network.to(dtype=dtype, memory_format=torch.channels_last), pairs)

    def on(self, device: torch.device) -> DiffusionWrapper:
        """The network, on a device."""
        if next(self.network.parameters()).device != device:
            self.network.to(device)
        return self.network

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The raw output [B, C, h, w] for noisy x, timesteps t [B] and a condition, and the outputs of its blocks."""
        network = self.on(x.device)
        with block_outputs(network.diffusion_model, [there for _, there in self.pairs]) as features:
            return network.predict(x, t, cond), features


@contextmanager
def block_outputs(unet: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What the named blocks of a U-Net put out [B, C, H, W], filled in while it runs within the block."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs[name] = output

    handles = [unet.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
