"""What a DreamBooth run adds to a training run: its flags in the yaml's place, and adapter directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.run import Run


def add_flags(parser: Any) -> None:
    """The flags of the adapter paper's main_dream_booth.py beyond main.py's."""
    flag = parser.add_argument_group("dreambooth").add_argument
    flag("--data_root", help="folder with photos of the subject; without it, the yaml's")
    flag(
        "--reg_data_root",
        help="folder with prior images of the class; without it (and none in the yaml), no prior loss",
    )
    flag("--class_word", help="the subject's class: captions are 'a photo of a sks CLASS_WORD'")
    flag("--datadir_in_name", nargs="?", const=True, default=True, type=_bool,
         help="put the photo folder's name before the run's date")  # fmt: skip
    flag("--embedding_manager_ckpt", default="", help="not yet: textual inversion")
    flag("--placeholder_string", help="not yet: textual inversion")
    flag("--init_word", "--init_words", help="not yet: textual inversion")


def _bool(text: str) -> bool:
    from ldm.cli import str2bool

    return str2bool(text)


def check_flags(options: Any) -> None:
    """Refuse, in one line, what is not there and folders that do not exist."""
    for flag in ("embedding_manager_ckpt", "placeholder_string", "init_word"):
        if getattr(options, flag):
            raise UserError(f"--{flag} belongs to textual inversion (train_level embeder), which is not yet there")
    for flag in ("data_root", "reg_data_root"):
        folder = getattr(options, flag)
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"--{flag}: there is no folder '{folder}'")


def run_prefix(options: Any) -> str:
    """What stands before the date in the run's name."""
    return Path(options.data_root).resolve().name if options.data_root and options.datadir_in_name else ""


def apply_flags(run: Run) -> None:
    """Put the flags' folders and class word into the run's yaml.

    Raises:
        UserError: photos or class word are given neither by flag nor in the yaml.
    """
    options, params = run.options, run.config.data.params
    folders = {"train": options.data_root, "validation": options.data_root, "reg": options.reg_data_root}
    for name, folder in folders.items():
        section = params.get(name)
        if section is None:
            continue
        if folder is not None:
            section.params.data_root = folder
        if options.class_word is not None:
            section.params.placeholder_token = options.class_word
    if "train" not in params or not params.train.params.get("data_root"):
        raise UserError("--data_root: the folder with photos of the subject is missing")
    if "reg" in params and not params.reg.params.get("data_root"):
        print("No --reg_data_root: training without prior images; other prompts may drift towards the subject.")
        del params["reg"]
    if "validation" in params and not params.validation.params.get("data_root"):
        params.validation.params.data_root = params.train.params.data_root
    if options.actual_resume:
        run.config.base_checkpoint = options.actual_resume
    elif run.resume_from is not None and run.config.get("base_checkpoint"):
        options.actual_resume = run.config.base_checkpoint


def trained_on(run: Run) -> Mapping[str, Any]:
    """What an adapter directory's manifest says of its training."""
    train = run.config.data.params.train.params
    return {
        "base_checkpoint": run.config.get("base_checkpoint", ""),
        "data_root": str(train.data_root),
        "class_word": train.get("placeholder_token", ""),
        "seed": run.options.seed,
    }


def adapter_checkpoints(run: Run, model: Any) -> list[Any]:
    """The callback that writes `<step>-adapters` directories, when adapters are trained."""
    from ldm.callbacks import AdapterCheckpoint

    if "adapter" not in model.train_level:
        return []
    settings = (run.lightning.get("modelcheckpoint") or {}).get("params") or {}
    every = settings.get("every_n_train_steps", 500)
    return [AdapterCheckpoint(run.checkpoints, every, trained_on(run))]
