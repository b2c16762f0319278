"""Flash Diffusion (Chadebec et al., 2024, arXiv:2406.02347): a LoRA that draws in a few steps what its teacher draws.

A step: latents are noised to one of the teacher's K timesteps. The frozen teacher goes from there to the end, with
guidance; the student predicts the end at once. What is between them is the distillation loss; an adversarial loss and
distribution matching add what a distance does not see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

from ldm.adamw import AdamW
from ldm.distillation.adversarial import FORMS, Discriminator, held_still
from ldm.distillation.distance import Distance
from ldm.distillation.matching import matching_loss
from ldm.distillation.path import TeacherPath
from ldm.distillation.pictures import LoraFile, side_by_side
from ldm.distillation.start import Phase, phase_at, read_phases, start_probabilities
from ldm.models.diffusion.ddpm import freeze
from ldm.models.diffusion.lcm import boundary
from ldm.models.diffusion.trainer import DiffusionTrainer
from ldm.modules import lora
from ldm.modules.randomness import GlobalRandom, Randomness, sample_seed
from ldm.util import UserError, get_obj_from_str, instantiate_from_config


class FlashDiffusion(DiffusionTrainer):
    """Trains the LoRA of a student, and the head that judges it; the teacher stays as it is.

    The student has the teacher's weights, the very same, and LoRA beside them. Checkpoints hold what is trained.

    Args:
        teacher_config: yaml of the teacher, a model that draws; its weights come by `start_from`.
        phases: see `Phase`, one after the other.
        teacher_steps: of the teacher's sampler, K in the paper. variance: of the modes of the start, in indices.
        guidance: the least and the highest scale of the teacher's guidance, of which each batch draws one.
        distillation_loss: l1, l2 or lpips. lpips_ckpt: see `Distance`.
        adversarial_form: lsgan, wgan, hinge, non-saturating or vanilla.
        adversarial_timesteps: to one of which the judged latents are noised.
        discriminator_lr_factor: of the head's learning rate.
        lora_config: see `LoraConfig`.
        use_ema, ema_decay: average the LoRA's weights; pictures and files are then of the average.
        denoiser: the class through which teacher and student are seen.
    """

    def __init__(
        self,
        teacher_config: Any,
        phases: Sequence[Mapping[str, Any]],
        teacher_steps: int = 32,
        variance: float = 0.5,
        guidance: Sequence[float] = (3.0, 13.0),
        distillation_loss: str = "l2",
        lpips_ckpt: str | Sequence[str] | None = None,
        adversarial_form: str = "lsgan",
        adversarial_timesteps: Sequence[int] = (10, 250, 500, 750),
        discriminator_lr_factor: float = 1.0,
        lora_config: Mapping[str, Any] | None = None,
        use_ema: bool = False,
        ema_decay: float = 0.999,
        denoiser: str = "ldm.distillation.denoisers.LatentDenoiser",
        monitor: str | None = None,
        scheduler_config: Any = None,
        noise_config: Any = None,
    ) -> None:
        super().__init__("image", monitor, scheduler_config, noise_config)
        self.phases = read_phases(phases)
        if adversarial_form not in FORMS:
            raise UserError(f"yaml: adversarial_form: '{adversarial_form}' is none of {', '.join(FORMS)}")
        self.form, self.discriminator_lr_factor = FORMS[adversarial_form], discriminator_lr_factor
        if not isinstance(guidance, Sequence) or len(guidance) != 2 or not guidance[0] <= guidance[1]:
            raise UserError(f"yaml: guidance is {guidance}; it must be two numbers, the least and the highest")
        if not variance > 0:
            raise UserError(f"yaml: variance is {variance}; it must be above 0")
        self.guidance = tuple(float(scale) for scale in guidance)
        self.variance, self.lora_config = variance, lora.LoraConfig.read(lora_config)
        self.ema_settings = {"decay": ema_decay} if use_ema else None
        self.teacher_config = teacher_config
        self.teacher = freeze(instantiate_from_config(teacher_config))
        self.teacher_loaded = bool(teacher_config["params"].get("ckpt_path"))
        self.student: nn.Module | None = None
        self.seen_teacher = get_obj_from_str(denoiser)(self.teacher, teacher_config)
        self.first_stage_key = self.seen_teacher.image_key
        schedule = self.seen_teacher.schedule
        if not 1 <= teacher_steps <= len(schedule):
            raise UserError(f"yaml: teacher_steps is {teacher_steps}; it must lie within 1 .. {len(schedule)}")
        self.path = TeacherPath(schedule, teacher_steps)
        self.adversarial_timesteps = tuple(adversarial_timesteps)
        if not 0 <= min(self.adversarial_timesteps) <= max(self.adversarial_timesteps) < len(schedule):
            raise UserError(f"yaml: adversarial_timesteps: the teacher has the timesteps 0 .. {len(schedule) - 1}")
        self.distance = Distance(distillation_loss, lpips_ckpt)
        self.discriminator = None
        if any(phase.adversarial for phase in self.phases):
            self.discriminator = Discriminator(self.seen_teacher.feature_channels)

    # ---- teacher and student ----------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The student's network, of which the average is taken."""
        return self.seen_student.network

    @property
    def encoding_model(self) -> nn.Module:
        """Whose autoencoder encodes a data set before training."""
        return self.teacher

    def start_from(self, path: str) -> None:
        """Read the teacher's weights, averaged ones where the file has them.

        Raises:
            UserError: the file cannot be read, or is not of this teacher.
        """
        from ldm.checkpoint import apply_state_dict, fold_ema, read_state_dict

        report = apply_state_dict(self.teacher, fold_ema(read_state_dict(path))[0], path).notable()
        if report.missing or any(key.startswith("model.") for key in report.unexpected):
            raise UserError(f"--actual_resume: '{path}' is not of the yaml's teacher: {'; '.join(report.lines()[:3])}")
        print("\n  ".join([f"The teacher is {path}", *report.lines()]))
        self.teacher_loaded = True

    def make_student(self) -> None:
        """Put the student beside the teacher, whose weights are there by now."""
        if not self.teacher_loaded:
            raise UserError("flash: the teacher's weights are missing; name its checkpoint with --actual_resume")
        self.seen_student = self.seen_teacher.twin()
        self.student = self.seen_student.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sample_seed(self.seed, "lora"))
            lora.inject(self.seen_student.network, self.lora_config)
        if self.ema_settings is not None:
            self.average_weights(**self.ema_settings)

    def setup(self, stage: str) -> None:
        if self.student is None:
            self.make_student()
        super().setup(stage)

    # ---- the loss ---------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict, random: Randomness | None = None) -> tuple[torch.Tensor, dict]:
        random = random or GlobalRandom(self.batch_size_of(batch), self.device)
        phase = phase_at(self.phases, self.global_step)
        with torch.no_grad():
            z, c, empty = self.seen_teacher.inputs(batch, random)
        start, scale = self.draw_start(phase)
        x = self.path.begin(z, self.draw_noise(z, random), start)
        output = self.predict(x, torch.full((len(x),), self.path.timesteps[start], device=x.device), c)
        target = self.follow_teacher(x, start, c, empty, scale)
        terms = {"distillation": self.distance(output, target, self.seen_teacher.decode)}
        if phase.matching:
            terms["matching"] = self.matching(output, c, empty, scale, random)
        judged = {}
        if self.discriminator is not None:
            terms["adversarial"], judged = self.adversarial(output, z, c, random, phase.adversarial > 0)
        loss = sum(getattr(phase, name) * term for name, term in terms.items())
        prefix = "train" if self.training else "val"
        logs = {**terms, "loss": loss, **judged, "start": torch.tensor(float(start))}
        logs = {f"{prefix}/{name}": value.detach() for name, value in logs.items()}
        return loss + sum(judged.values()), logs

    def draw_start(self, phase: Phase) -> tuple[int, float]:
        """The start index and the teacher's guidance scale, which a batch shares, on all processes."""
        generator = torch.Generator().manual_seed(sample_seed(self.seed, "start", self.batches_seen))
        chances = start_probabilities(len(self.path.timesteps), phase.modes, self.variance)
        start = int(torch.multinomial(chances, 1, generator=generator))
        low, high = self.guidance
        return start, low + (high - low) * float(torch.rand((), generator=generator))

    def predict(self, x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        """The student's clean sample from x [B, C, h, w] at timesteps t [B], in one step (LCM's boundary)."""
        skip, out = (factor.view(-1, 1, 1, 1) for factor in boundary(t))
        return skip * x + out * self.seen_student.x0(x, t, c)

    @torch.no_grad()
    def follow_teacher(self, x: torch.Tensor, start: int, c: Any, empty: Any, scale: float) -> torch.Tensor:
        """The clean sample that the guided teacher reaches from x [B, C, h, w] at the place `start`."""
        return self.path(lambda x, t: self.seen_teacher.x0(x, t, c, empty, scale), x, start)

    def matching(self, output: torch.Tensor, c: Any, empty: Any, scale: float, random: Randomness) -> torch.Tensor:
        """Distribution matching of the student's samples, noised to timesteps of any level; the student is `fake`."""
        with torch.no_grad():
            t = random.randint(len(self.seen_teacher.schedule)).to(output.device)
            x = self.seen_teacher.schedule.noised(output, t, random.randn_like(output))
            real = self.seen_teacher.x0(x, t, c, empty, scale)
            fake = self.seen_student.x0(x, t, c)
        return matching_loss(output, real, fake)

    def adversarial(
        self, output: torch.Tensor, z: torch.Tensor, c: Any, random: Randomness, teaches: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The student's adversarial loss, and the discriminator's; both learn in a step, the other held still.

        Args:
            teaches: the student's gradient is wanted.
        """
        schedule = self.seen_teacher.schedule
        choice = random.randint(len(self.adversarial_timesteps)).to(z.device)
        t = torch.tensor(self.adversarial_timesteps, device=z.device)[choice]
        noise = random.randn_like(z)
        with torch.no_grad():
            real = self.seen_teacher.features(schedule.noised(z, t, noise), t, c)
        with torch.set_grad_enabled(teaches and torch.is_grad_enabled()):
            fake = self.seen_teacher.features(schedule.noised(output, t, noise), t, c)
        with held_still(self.discriminator):
            term = self.form.generator(self.discriminator(fake))
        judged = self.form.discriminator(self.discriminator(real), self.discriminator(fake.detach()))
        return term, {"discriminator": judged}

    # ---- Lightning --------------------------------------------------------------------------------------------

    def make_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        groups = [{"params": [p for p in self.student.parameters() if p.requires_grad]}]
        if self.discriminator is not None:
            rate = self.discriminator_lr_factor * self.learning_rate
            groups.append({"params": list(self.discriminator.parameters()), "lr": rate})
        return AdamW(groups, lr=self.learning_rate, fused=fused)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **kwargs: Any) -> None:
        """Clip the student's gradient and the discriminator's each by its own norm."""
        for group in optimizer.param_groups if gradient_clip_val else []:
            nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def configure_callbacks(self) -> list[Callback]:
        return [LoraFile()]

    @property
    def strict_loading(self) -> bool:
        """Checkpoints hold only what is trained."""
        return False

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in trained or k.startswith("model_ema.")}

    def log_images(self, batch: dict, N: int = 8, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Pictures for the log: see `side_by_side`."""
        return side_by_side(self, batch, N, **kwargs)
