"""What a DreamBooth run adds to a training run: its flags in the yaml's place, and adapter directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.run import Run

EMBEDDINGS = "ldm.modules.embedding_manager.EmbeddingManager"
PLACEHOLDER = "<sks>"


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
    flag("--placeholder_string", help="train_level embeder: the new word, e.g. <toy>")
    flag("--init_word", "--init_words", help="what its vectors start as, e.g. toy (default: the class word)")
    flag("--embedding_manager_ckpt", default="", help="a file with vectors that new words start as")


def _bool(text: str) -> bool:
    from ldm.cli import str2bool

    return str2bool(text)


def check_flags(options: Any) -> None:
    """Refuse, in one line, files and folders that do not exist."""
    if options.embedding_manager_ckpt and not Path(options.embedding_manager_ckpt).is_file():
        raise UserError(f"--embedding_manager_ckpt: there is no file '{options.embedding_manager_ckpt}'")
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
    apply_words(run)
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


def levels_of(run: Run) -> list[str]:
    """What the run trains, see `ldm.models.diffusion.ddpm_dream.TRAIN_LEVELS`."""
    levels = run.config.model.params.get("train_level", ["adapter"])
    return [levels] if isinstance(levels, str) else list(levels)


def apply_words(run: Run) -> None:
    """Let the captions name the subject by the new word of textual inversion, where one is trained.

    Raises:
        UserError: flags of textual inversion are given, and it is not trained.
    """
    options, model, data = run.options, run.config.model.params, run.config.data.params
    given = [name for name in ("placeholder_string", "init_word", "embedding_manager_ckpt") if getattr(options, name)]
    if "embeder" not in levels_of(run):
        if given:
            raise UserError(f"--{given[0]}: belongs to textual inversion; add embeder to model.params.train_level")
        return
    section = model.get("personalization_config") or {}
    section = {"target": section.get("target", EMBEDDINGS), "params": dict(section.get("params") or {})}
    words = section["params"].get("placeholder_strings") or [PLACEHOLDER]
    words = [options.placeholder_string] if options.placeholder_string else list(words)
    section["params"]["placeholder_strings"] = words
    class_word = (data.get("train") or {}).get("params", {}).get("placeholder_token")
    if options.init_word or not section["params"].get("initializer_words"):
        section["params"]["initializer_words"] = [options.init_word or class_word or "object"]
    model.personalization_config = section
    if options.embedding_manager_ckpt:
        model.embedding_manager_ckpt = options.embedding_manager_ckpt
    for name in ("train", "validation"):
        if data.get(name) is not None:
            data[name].params.setdefault("subject", " ".join(words))


def trained_on(run: Run) -> Mapping[str, Any]:
    """What the files of what was trained say of their training."""
    from ldm.data.personalized_dream import SUBJECT, caption_of

    train = run.config.data.params.train.params
    class_word = train.get("placeholder_token", "")
    return {
        "base_checkpoint": run.config.get("base_checkpoint", ""),
        "data_root": str(train.data_root),
        "class_word": class_word,
        "trigger": caption_of(class_word or "dog", train.get("subject", SUBJECT)),
        "seed": run.options.seed,
    }


def callbacks(run: Run, model: Any) -> list[Any]:
    """What happens beside a run: the files of what was trained are written as often as checkpoints are."""
    from ldm.callbacks import ArtefactCheckpoint

    settings = (run.lightning.get("modelcheckpoint") or {}).get("params") or {}
    every = settings.get("every_n_train_steps", 500)
    return [ArtefactCheckpoint(run.checkpoints, every, trained_on(run))]
