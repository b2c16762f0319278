"""A training run from yaml files and flags: what main.py and main_dream_booth.py share."""

from __future__ import annotations

import datetime
import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm import cli
from ldm.errors import UserError

# Lightning 1 words that old command lines and yaml files hold -> a function that gives Lightning 2's settings.
OLD_WORDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gpus": lambda v: _gpus(v),
    "distributed_backend": lambda v: {"strategy": v},
    "progress_bar_refresh_rate": lambda v: {"enable_progress_bar": bool(v)},
    "checkpoint_callback": lambda v: {"enable_checkpointing": bool(v)},
    "flush_logs_every_n_steps": lambda v: {},
    "weights_summary": lambda v: {"enable_model_summary": bool(v)},
    "resume_from_checkpoint": lambda v: {},
}
PRECISIONS = {"16": "16-mixed", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}


def add_flags(parser: cli.ArgumentParser) -> None:
    """The flags that both mains have, those of CompVis' main.py."""
    flag = parser.add_argument
    flag("-n", "--name", nargs="?", const=True, default="", help="a name for the run, put after its date")
    flag("-r", "--resume", nargs="?", const=True, default="", help="go on from a run's folder or a .ckpt in it")
    flag("-b", "--base", nargs="*", metavar="base_config.yaml", default=[],
         help="yaml files, merged left to right; then key.subkey=value overrides")  # fmt: skip
    flag("-t", "--train", nargs="?", const=True, default=False, type=cli.str2bool, help="train")
    flag("--no-test", nargs="?", const=True, default=False, type=cli.str2bool, help="no test after training")
    flag("-p", "--project", help="name of the project, for loggers that want one")
    flag("-d", "--debug", nargs="?", const=True, default=False, type=cli.str2bool, help="post-mortem debugging")
    flag("-s", "--seed", type=int, default=23, help="seed of everything random")
    flag("-f", "--postfix", default="", help="put after the run's name")
    flag("-l", "--logdir", default="logs", help="folder in which the run gets its own")
    flag("--scale_lr", nargs="?", const=True, default=True, type=cli.str2bool,
         help="multiply base_learning_rate by devices * batch size * accumulated batches")  # fmt: skip
    flag("--actual_resume", default="", help="a checkpoint whose weights training starts from")
    trainer = parser.add_argument_group("trainer", "also in the yaml, under lightning.trainer; a flag wins")
    trainer.add_argument("--gpus", help="old: devices as '0,' or '0,1'; without CUDA the CPU is used")
    trainer.add_argument("--accelerator", help="auto, gpu, cpu or mps")
    trainer.add_argument("--devices", help="how many, or which ones as '0,1'")
    trainer.add_argument("--num_nodes", type=int, help="machines")
    trainer.add_argument("--strategy", help="auto, ddp, fsdp, deepspeed, ...")
    trainer.add_argument("--precision", help="32, bf16, 16")
    trainer.add_argument("--max_steps", type=int, help="stop after that many optimiser steps")
    trainer.add_argument("--max_epochs", type=int, help="stop after that many passes over the data")
    trainer.add_argument("--accumulate_grad_batches", type=int, help="batches a step")
    trainer.add_argument("--gradient_clip_val", type=float, help="clip the gradient's norm")
    trainer.add_argument("--limit_val_batches", type=int, help="validation batches, 0 for none")
    trainer.add_argument("--val_check_interval", type=int, help="validate every that many batches")
    parser.add_argument("overrides", nargs="*", default=[], help="key.subkey=value, over the yaml")


TRAINER_FLAGS = (
    "gpus", "accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps", "max_epochs",
    "accumulate_grad_batches", "gradient_clip_val", "limit_val_batches", "val_check_interval",
)  # fmt: skip


@dataclass
class Run:
    """A run's settings after flags and yaml are read, before anything heavy is built."""

    options: Any
    config: Any  # DictConfig with model and data
    lightning: Any  # DictConfig with trainer, callbacks, modelcheckpoint
    directory: Path
    resume_from: Path | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints and adapters of the run lie."""
        return self.directory / "checkpoints"


def read_run(options: Any, prefix: str = "") -> Run:
    """Check flags and files and decide the run's folder; nothing is written and no model is built.

    Args:
        options: the parsed flags of `add_flags`. prefix: put before the date in the run's name.

    Raises:
        UserError: a file or setting is wrong.
    """
    from omegaconf import OmegaConf

    from ldm.util import load_yaml

    base, overrides = _split(options.base, options.overrides)
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    resume_from = None
    if options.resume:
        if options.name:
            raise UserError("-n/--name and -r/--resume exclude each other: a resumed run keeps its name")
        directory, resume_from = _find_resume(str(options.resume))
        base = [str(p) for p in sorted((directory / "configs").glob("*.yaml"))] + base
    if not base:
        raise UserError("-b/--base: at least one yaml file is needed, e.g. --base configs/tiny/diffusion.yaml")
    config = load_yaml(*base, overrides=overrides)
    for key in ("model", "data"):
        if key not in config or "target" not in (config[key] or {}):
            raise UserError(f"yaml: '{key}:' with a 'target:' is missing in {', '.join(base)}")
    if not options.resume:
        name = options.name if isinstance(options.name, str) and options.name else Path(base[0]).stem
        directory = Path(options.logdir) / f"{prefix}{now}_{name}{options.postfix}"
    if options.actual_resume and not Path(options.actual_resume).exists():
        raise UserError(f"--actual_resume: there is no checkpoint '{options.actual_resume}'")
    lightning = config.pop("lightning", None) or OmegaConf.create()
    run = Run(options, config, lightning, directory, resume_from)
    run.trainer = trainer_settings(options, lightning)
    return run


def _split(base: Sequence[str], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--base a.yaml b.yaml x=1` holds files and overrides: tell them apart."""
    words = [*base, *overrides]
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]


def _find_resume(path: str) -> tuple[Path, Path]:
    """The run's folder and the checkpoint to go on from, for `--resume` with either of them."""
    where = Path(path)
    if where.is_file():
        directory = where.parent.parent if where.parent.name == "checkpoints" else where.parent
        return directory, where
    if not where.is_dir():
        raise UserError(f"--resume: there is no run or checkpoint '{path}'")
    last = where / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise UserError(f"--resume: '{path}' has no checkpoints/last.ckpt")
    return where, last


def _gpus(value: Any) -> dict[str, Any]:
    """`0,` is device 0, `0,1` two devices, `2` two devices, 0 or none the CPU."""
    text = str(value).strip()
    if not re.fullmatch(r"-?\d+|(\d+,)+\d*", text):
        raise UserError(f"--gpus {value}: expected device numbers such as '0,' or '0,1', or a count")
    if text == "0":
        return {"accelerator": "cpu"}
    import torch

    if not torch.cuda.is_available():
        print(f"No CUDA device here: --gpus {text} is read as the CPU.")
        return {"accelerator": "cpu", "devices": 1}
    return {
        "accelerator": "gpu",
        "devices": [int(n) for n in text.split(",") if n] if "," in text else int(text),
    }


def trainer_settings(options: Any, lightning: Any) -> dict[str, Any]:
    """Keyword arguments of `pl.Trainer` from the yaml's lightning.trainer and the flags, old words translated.

    Raises:
        UserError: a word that Lightning's trainer does not know.
    """
    from omegaconf import OmegaConf

    words = dict(OmegaConf.to_container(lightning.get("trainer") or OmegaConf.create(), resolve=True))
    words |= {k: getattr(options, k) for k in TRAINER_FLAGS if getattr(options, k, None) is not None}
    settings: dict[str, Any] = {}
    for word, value in words.items():
        if word in OLD_WORDS:
            new = OLD_WORDS[word](value)
            settings |= {k: v for k, v in new.items() if k not in words}
            if word != "gpus":
                print(f"lightning.trainer.{word} is an old word, read as {new or 'nothing'}")
        else:
            settings[word] = value
    if "precision" in settings:
        settings["precision"] = PRECISIONS.get(str(settings["precision"]), settings["precision"])
    if isinstance(settings.get("devices"), str):
        devices = settings["devices"]
        settings["devices"] = [int(n) for n in devices.split(",") if n] if "," in devices else devices
    return settings


def _check_trainer_words(settings: dict[str, Any]) -> None:
    import pytorch_lightning as pl

    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    for word in settings:
        if word not in known:
            raise UserError(f"yaml: lightning.trainer.{word}: unknown; known are {', '.join(sorted(known))}")


def build_trainer(run: Run, model: Any, extra_callbacks: Sequence[Any] = ()) -> Any:
    """The Lightning trainer of a run, with its logger, checkpoints, bar and pictures."""
    import pytorch_lightning as pl
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import LearningRateMonitor
    from pytorch_lightning.loggers import TensorBoardLogger

    from ldm.callbacks import AtomicCheckpointIO, SaveOnInterrupt, StepBar, checkpoint_callbacks
    from ldm.util import instantiate_from_config

    _check_trainer_words(run.trainer)
    checkpoint = OmegaConf.to_container(run.lightning.get("modelcheckpoint") or OmegaConf.create())
    callbacks = [StepBar(), SaveOnInterrupt(run.checkpoints), LearningRateMonitor("step")]
    callbacks += checkpoint_callbacks(str(run.checkpoints), checkpoint.get("params", {}), model.monitor)
    for section in (run.lightning.get("callbacks") or {}).values():
        callbacks.append(instantiate_from_config(section))
    settings = {
        "logger": TensorBoardLogger(str(run.directory), name="", version="tensorboard"),
        "default_root_dir": str(run.directory),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 50,
        "plugins": [AtomicCheckpointIO()],
        "use_distributed_sampler": False,
    } | run.trainer
    return pl.Trainer(callbacks=[*callbacks, *extra_callbacks], **settings)


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
    """Keep the run's yaml beside its results, for --resume and for people."""
    from omegaconf import OmegaConf

    from ldm.util import atomic_path

    with atomic_path(run.directory / "configs" / "project.yaml") as temporary:
        OmegaConf.save(OmegaConf.merge(run.config, {"lightning": run.lightning}), temporary)


def train(run: Run, extra_callbacks: Callable[[Any], Sequence[Any]] = lambda model: ()) -> Any:
    """Build data, model and trainer, fit, test, and return the trainer.

    Args:
        extra_callbacks: from the built model, callbacks beside the usual ones.

    Raises:
        UserError: a yaml section, checkpoint or data set is wrong.
    """
    import pytorch_lightning as pl
    import torch

    from ldm.util import instantiate_from_config

    options = run.options
    _quiet()
    pl.seed_everything(options.seed, workers=True, verbose=False)
    data = instantiate_from_config(run.config.data)
    data.seed = options.seed
    data.setup("fit")
    model = instantiate_from_config(run.config.model).to(memory_format=torch.channels_last)
    model.seed = options.seed
    if options.actual_resume:
        from ldm.checkpoint import load_into

        load_into(model, options.actual_resume)
    trainer = build_trainer(run, model, extra_callbacks(model))
    model.learning_rate = scaled_learning_rate(run, trainer, data.batch_size)
    if not options.train:
        print("Everything is in order; add -t to train.")
        return trainer
    if trainer.is_global_zero:
        write_configs(run)
        print(f"The run's folder is {run.directory}")
    data.encode(model, trainer.strategy.root_device)
    trainer.fit(model, data, ckpt_path=str(run.resume_from) if run.resume_from else None, weights_only=False)
    if trainer.is_global_zero:
        print(f"Finished at step {trainer.global_step}; checkpoints are in {run.checkpoints}")
    if not options.no_test and "test" in data.datasets and not trainer.interrupted:
        trainer.test(model, data)
    return trainer


def _quiet() -> None:
    """Turn off Lightning's advertisements and hints that do not concern the person training."""
    import logging
    import warnings

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    hints = ("does not have many workers", "isinstance.treespec", "tensorboard", "lr_scheduler.step", "val_dataloader",
             "in eval mode at the start", "smaller than the logging interval")  # fmt: skip
    for hint in hints:
        warnings.filterwarnings("ignore", f".*{hint}.*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
