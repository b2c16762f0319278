"""A training run: trainer, logger and callbacks from yaml sections, fitting, and errors in one line."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ldm.errors import UserError
from ldm.run import Run

LOGGERS = {"tensorboard": "TensorBoardLogger", "wandb": "WandbLogger", "csv": "CSVLogger"}  # of Lightning's


def _check_trainer_words(settings: dict[str, Any]) -> None:
    import pytorch_lightning as pl

    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    for word in settings:
        if word not in known:
            raise UserError(f"yaml: lightning.trainer.{word}: unknown; known are {', '.join(sorted(known))}")


def build_logger(run: Run) -> Any:
    """The logger that `lightning.logger` asks for: tensorboard (default), wandb, csv, or a section {target, params}.

    Raises:
        UserError: its package is not installed.
    """
    from pytorch_lightning import loggers

    from ldm.util import instantiate_from_config

    wanted = run.lightning.get("logger") or "tensorboard"
    try:
        if not isinstance(wanted, str):
            return instantiate_from_config(wanted)
        if wanted not in LOGGERS:
            raise UserError(f"yaml: lightning.logger: '{wanted}' is none of {', '.join(LOGGERS)}, and no section")
        kind = getattr(loggers, LOGGERS[wanted])
        if wanted == "wandb":  # the folder's name as id: a resumed run goes on in the same curves
            name = run.directory.name
            project = run.options.project or "ldm"
            return kind(name=name, id=name, save_dir=str(run.directory), project=project, resume="allow")
        return kind(str(run.directory), name="", version=wanted)
    except ModuleNotFoundError as error:
        raise UserError(f"yaml: lightning.logger: {wanted} needs a package that is not installed: {error}") from error


def build_trainer(run: Run, model: Any, extra_callbacks: Sequence[Any] = ()) -> Any:
    """The Lightning trainer of a run, with its logger, checkpoints, bar and pictures.

    Raises:
        UserError: Lightning refuses a setting, such as a strategy whose package is missing.
    """
    import pytorch_lightning as pl
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import LearningRateMonitor
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.callbacks import EncodeImages, StepBar, StepSeeds
    from ldm.saving import AtomicCheckpointIO, checkpoint_callback
    from ldm.util import instantiate_from_config
    from ldm.weight_files import one_line

    _check_trainer_words(run.trainer)
    settings = {
        "logger": build_logger(run) if run.trainer.get("logger", True) is True else run.trainer["logger"],
        "default_root_dir": str(run.directory),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 50,
        "plugins": [AtomicCheckpointIO()],
        "use_distributed_sampler": False,
    } | {word: value for word, value in run.trainer.items() if word != "logger"}
    checkpoint = OmegaConf.to_container(run.lightning.get("modelcheckpoint") or OmegaConf.create()).get("params") or {}
    callbacks = [EncodeImages(), StepBar(), *([LearningRateMonitor("step")] if settings["logger"] else [])]
    callbacks += [instantiate_from_config(section) for section in (run.lightning.get("callbacks") or {}).values()]
    if settings.get("enable_checkpointing", True):
        on_signal = run.options.on_signal
        callbacks.append(checkpoint_callback(run.checkpoints, checkpoint, model.monitor, on_signal))
    try:
        return pl.Trainer(callbacks=[*callbacks, *extra_callbacks, StepSeeds()], **settings)
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"lightning: {one_line(error)}") from error


def scaled_learning_rate(run: Run, trainer: Any, batch_size: int) -> float:
    """base_learning_rate, times devices * batch size * accumulated batches with --scale_lr; says the sum."""
    base = run.config.model.get("base_learning_rate")
    if base is None:
        raise UserError("yaml: model.base_learning_rate is missing")
    if not run.options.scale_lr:
        print(f"Learning rate {base:.2e}")
        return float(base)
    accumulate, devices = trainer.accumulate_grad_batches, trainer.world_size
    rate = accumulate * devices * batch_size * base
    print(
        f"Learning rate {rate:.2e} = {accumulate} (accumulated batches) * {devices} (devices) * {batch_size} "
        f"(batch size) * {base:.2e} (base_learning_rate); --scale_lr False uses the last alone"
    )
    return float(rate)


def write_configs(run: Run) -> None:
    """Keep the run's yaml, flags included, beside its results, for --resume and for people."""
    from omegaconf import OmegaConf

    from ldm.util import atomic_path

    with atomic_path(run.directory / "configs" / "project.yaml") as temporary:
        OmegaConf.save(OmegaConf.merge(run.config, {"lightning": run.lightning}), temporary)


def train(run: Run, extra_callbacks: Callable[[Any], Sequence[Any]] = lambda model: ()) -> Any:
    """Build data, model and trainer, fit, test, and return the trainer.

    Args:
        extra_callbacks: from the built model, callbacks beside the usual ones.

    Raises:
        UserError: a yaml section, checkpoint or data set is wrong; or the run cannot go on.
    """
    import pytorch_lightning as pl

    from ldm import resume
    from ldm.memory import keep_freed
    from ldm.modules.fast_layers import sped_up

    options = run.options
    _quiet()
    pl.seed_everything(options.seed, workers=True, verbose=False)
    data, model = _build(run)
    trainer = build_trainer(run, model, extra_callbacks(model))
    model.learning_rate = scaled_learning_rate(run, trainer, data.batch_size)
    if not options.train:
        print("Everything is in order; add -t to train.")
        return trainer
    with plain_errors():
        if trainer.is_global_zero:
            write_configs(run)
            resume.remove_leftovers(run.checkpoints)
            if run.resume_from:
                resume.renew_last(run.resume_from)
        print(f"The run's folder is {run.directory}")
        if run.resume_from:
            print("\n  ".join([f"Takes up {run.resume_from}", *(f"Changed: {line}" for line in run.changes)]))
        known = run.resume_from is None or (run.resume_from.is_dir() and options.actual_resume)
        known = known or hasattr(model, "start_from")
        if not known and getattr(data, "cache_latents", False):
            from ldm.checkpoint import load_encoders

            load_encoders(model, run.resume_from)  # Lightning does it later than they encode
        keep_freed()
        with sped_up(model, keep=False):
            trainer.fit(model, data, ckpt_path=run.resume_from and str(run.resume_from), weights_only=True)
    print(f"Finished at step {trainer.global_step}; checkpoints are in {run.checkpoints}")
    if not options.no_test and "test" in data.datasets and not trainer.interrupted:
        trainer.test(model, data)
    return trainer


def _build(run: Run) -> tuple[Any, Any]:
    """The data module and the model of a run."""
    import torch

    from ldm.util import instantiate_from_config

    data = instantiate_from_config(run.config.data)
    data.seed = run.options.seed
    weights = run.options.actual_resume or run.resume_from
    data.words = [*run.words, *(["--ckpt", str(weights)] if weights else [])]
    data.setup("fit")
    model = instantiate_from_config(run.config.model).to(memory_format=torch.channels_last)
    model.seed = run.options.seed
    if run.options.actual_resume:
        run.config.base_checkpoint = run.options.actual_resume
    if hasattr(model, "start_from"):  # a student: its teacher's weights are in no checkpoint of the run
        if run.config.get("base_checkpoint"):
            model.start_from(run.config.base_checkpoint)
    elif run.options.actual_resume:
        from ldm.checkpoint import load_into

        load_into(model, run.options.actual_resume)
    return data, model


def _between_processes(error: BaseException) -> bool:
    """Whether Python raised it where processes talk to each other."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("multiprocessing.")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Say in one line what ends a run from outside of it: a full disk, a dead loader or other process."""
    from ldm.saving import DISK
    from ldm.weight_files import one_line

    advice = "the checkpoints are as they were last written: mend it and go on with --resume"
    loader = "a loader process died: {}; too little memory is the usual cause (num_workers)"
    try:
        yield
    except (OSError, EOFError) as error:
        if _between_processes(error):  # it died while it handed over a batch
            raise UserError(f"data: {loader.format(one_line(error))}; {advice}") from error
        if getattr(error, "errno", None) not in DISK:
            raise
        raise UserError(f"training: {error}; {advice}") from error
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text and "Caught" not in text:
            raise UserError(f"data: {loader.format(one_line(error))}; {advice}") from error
        if any(name in text for name in ("gloo", "NCCL", "Connection closed by peer")):
            raise UserError(f"training: another process of the run is gone ({one_line(error)}); {advice}") from error
        raise


def _quiet() -> None:
    """Turn off Lightning's advertisements and hints that do not concern the person training."""
    import logging
    import warnings

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    hints = ("does not have many workers", "isinstance.treespec", "tensorboard", "lr_scheduler.step", "val_dataloader",
             "in eval mode at the start", "smaller than the logging interval", "dataloader is not resumable",
             "exists and is not empty", "pre-optimization state")  # fmt: skip
    for hint in hints:
        warnings.filterwarnings("ignore", f".*{hint}.*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
