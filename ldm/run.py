"""A run's settings from flags and yaml, before anything heavy is built: what main.py and main_dream_booth.py share."""

from __future__ import annotations

import argparse
import datetime
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm import cli
from ldm.errors import UserError
from ldm.processes import devices_of_launcher, only_first_prints

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
PRECISIONS = {"16": "16-mixed", "fp16": "16-mixed", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}
REMEMBERED = {"seed": 23, "scale_lr": True}  # flags that a resumed run keeps, and what they are without one


def add_flags(parser: cli.ArgumentParser) -> None:
    """The flags that both mains have, those of CompVis' main.py."""
    flag = parser.add_argument
    flag("-n", "--name", nargs="?", const=True, default="", help="a name for the run, put after its date")
    flag("-r", "--resume", nargs="?", const=True, default="",
         help="go on exactly from a run's folder (its newest good checkpoint) or a .ckpt in it; without a value: from "
         "the newest run of this --name in --logdir, or begin it")  # fmt: skip
    flag("-b", "--base", nargs="*", metavar="base_config.yaml", default=[],
         help="yaml files, merged left to right; then key.subkey=value overrides")  # fmt: skip
    flag("-t", "--train", nargs="?", const=True, default=False, type=cli.str2bool, help="train")
    flag("--no-test", nargs="?", const=True, default=False, type=cli.str2bool, help="no test after training")
    flag("-p", "--project", help="name of the project, for loggers that want one")
    flag("-d", "--debug", nargs="?", const=True, default=False, type=cli.str2bool, help="post-mortem debugging")
    flag(
        "-s", "--seed", type=int, default=argparse.SUPPRESS, help="seed of everything random (23, or the resumed run's)"
    )
    flag("-f", "--postfix", default="", help="put after the run's name")
    flag("-l", "--logdir", default="logs", help="folder in which the run gets its own")
    flag("--scale_lr", nargs="?", const=True, default=argparse.SUPPRESS, type=cli.str2bool,
         help="multiply base_learning_rate by devices * batch size * accumulated batches (true, or as the resumed "
         "run)")  # fmt: skip
    flag("--actual_resume", default="", help="a checkpoint whose weights training starts from")
    flag("--on_signal", choices=("save", "continue", "exit"), default="save",
         help="what SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 do at the end of the present step: save and leave with exit "
         "code 128 + the signal's number (143, 130, 138); save and continue; exit without saving. A second Ctrl-C ends "
         "the run at once")  # fmt: skip
    trainer = parser.add_argument_group("trainer", "also in the yaml, under lightning.trainer; a flag wins")
    trainer.add_argument("--gpus", help="old: devices as '0,' or '0,1'; without CUDA the CPU is used")
    trainer.add_argument("--accelerator", help="auto, gpu, cpu or mps")
    trainer.add_argument("--devices", help="how many, or which ones as '0,1'; torchrun and srun say it themselves")
    trainer.add_argument("--num_nodes", type=int, help="machines; torchrun and srun say it themselves")
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
    lightning: Any  # DictConfig with trainer, callbacks, modelcheckpoint, logger
    directory: Path
    resume_from: Path | None = None
    changes: list[str] = field(default_factory=list)  # what flags and yaml say otherwise than the resumed run
    trainer: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)  # `--base` with the yaml files and overrides that the run is of

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
    from ldm.util import load_yaml

    only_first_prints()
    base, overrides = _split(options.base, options.overrides)
    directory, resume_from = _resumed(options, base, prefix)
    earlier = [str(p) for p in sorted((directory / "configs").glob("*.yaml"))] if resume_from else []
    if not earlier + base:
        raise UserError("-b/--base: at least one yaml file is needed, e.g. --base configs/tiny/diffusion.yaml")
    config = load_yaml(*earlier, *base, overrides=overrides)
    for key in ("model", "data"):
        if key not in config or "target" not in (config[key] or {}):
            raise UserError(f"yaml: '{key}:' with a 'target:' is missing in {', '.join(earlier + base)}")
    if options.actual_resume and not Path(options.actual_resume).exists():
        raise UserError(f"--actual_resume: there is no checkpoint '{options.actual_resume}'")
    _remember(options, config)
    _merge_trainer_flags(options, config)
    changes = _changes(load_yaml(*earlier), config) if earlier else []
    lightning = config.pop("lightning")
    run = Run(options, config, lightning, directory, resume_from, changes)
    run.trainer = trainer_settings(lightning.trainer)
    run.words = ["--base", *earlier, *base, *overrides]
    return run


def _resumed(options: Any, base: Sequence[str], prefix: str) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from, if it is an earlier run's."""
    from ldm import resume

    name = options.name if isinstance(options.name, str) and options.name else Path(base[0]).stem if base else ""
    name += options.postfix
    if options.resume is True:
        if not name:
            raise UserError(
                "-r/--resume: name a run's folder, or give -n/--name or --base for the newest run of that name"
            )
        newest = resume.newest_run(options.logdir, prefix, name)
        if newest is not None:
            return resume.find(str(newest))
        print(f"There is no run '{name}' in '{options.logdir}' to go on from: it begins")
    elif options.resume:
        if options.name:
            raise UserError("-n/--name and -r/--resume FOLDER exclude each other: a resumed run keeps its name")
        return resume.find(options.resume)
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    return Path(options.logdir) / f"{prefix}{now}_{name}", None


def _split(base: Sequence[str], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--base a.yaml b.yaml x=1` holds files and overrides: tell them apart."""
    words = [*base, *overrides]
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]


def _remember(options: Any, config: Any) -> None:
    """Decide the flags that a resumed run keeps, and put them into the yaml for the next resume."""
    kept = config.get("run") or {}
    config.run = {key: getattr(options, key, kept.get(key, usual)) for key, usual in REMEMBERED.items()}
    for key in REMEMBERED:
        setattr(options, key, config.run[key])


def _merge_trainer_flags(options: Any, config: Any) -> None:
    """Put the trainer's flags into the yaml, where they win; `--gpus` and today's words replace each other."""
    from omegaconf import OmegaConf

    flags = {key: getattr(options, key) for key in TRAINER_FLAGS if getattr(options, key, None) is not None}
    lightning = config.get("lightning") or OmegaConf.create()
    words = dict(lightning.get("trainer") or {})
    replaced = {"accelerator", "devices"} if "gpus" in flags else {"gpus"} if flags.keys() & {"devices"} else set()
    lightning.trainer = {k: v for k, v in words.items() if k not in replaced} | flags
    config.lightning = lightning


def _changes(before: Any, after: Any) -> list[str]:
    from omegaconf import OmegaConf

    from ldm.resume import changes

    return list(changes(OmegaConf.to_container(before), OmegaConf.to_container(after)))


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


def trainer_settings(section: Any) -> dict[str, Any]:
    """Keyword arguments of `pl.Trainer` from lightning.trainer: old words translated, devices as launched."""
    from omegaconf import OmegaConf

    words = dict(OmegaConf.to_container(section, resolve=True))
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
    for word, value in devices_of_launcher().items():
        if settings.get(word) in (None, "auto", -1):
            settings[word] = value
    return settings
