"""What a DreamBooth run adds to a training run: its flags in the yaml's place, and the files of what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.hub import is_hub_name
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
    flag("--num_reg_images", type=int,
         help="prior images that are wanted: what --reg_data_root lacks of them, the model draws before training (200 "
         "where that folder is missing or empty, else what is there)")  # fmt: skip
    flag("--reg_prompts", help="what they show: a file of prompts, taken by turns (default: 'a photo of a CLASS_WORD')")
    flag("--reg_steps", type=int, default=25, help="steps of DPM-Solver++ a prior image")
    flag("--reg_scale", type=float, default=1.0, help="guidance scale of prior images; 1 keeps the model where it is")
    flag("--pick_best", metavar="FEATURES",
         help="after every save, measure similarity to the photos and drift of other prompts, and keep the best step "
         "as best-...: 'tiny-world', or a folder with CLIP's or DINO's weights")  # fmt: skip
    flag("--validation_prompts", nargs="+", help="captions of the sample pictures during training")
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
    if options.data_root is not None and not Path(options.data_root).is_dir():
        raise UserError(f"--data_root: there is no folder '{options.data_root}'")
    reg = options.reg_data_root
    if reg is not None and not Path(reg).is_dir() and (Path(reg).exists() or not options.train):
        raise UserError(f"--reg_data_root: there is no folder '{reg}'")
    for flag, least in (("num_reg_images", 0), ("reg_steps", 1)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    features = options.pick_best
    if features and features != "tiny-world" and not Path(features).is_dir() and not is_hub_name(features):
        raise UserError(f"--pick_best: '{features}' is neither tiny-world nor a folder with CLIP's or DINO's weights")
    if options.reg_prompts and not Path(options.reg_prompts).exists():
        raise UserError(f"--reg_prompts: there is no file '{options.reg_prompts}'")


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
    if options.pick_best:
        run.lightning.best_step = {**(run.lightning.get("best_step") or {}), "features": options.pick_best}
    if options.validation_prompts:
        logger = (run.lightning.get("callbacks") or {}).get("image_logger")
        if logger is None:
            raise UserError("--validation_prompts: the yaml has no lightning.callbacks.image_logger")
        logger.params.prompts = list(options.validation_prompts)
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
    from ldm.data.personalized_dream import SUBJECT

    settings = (run.lightning.get("modelcheckpoint") or {}).get("params") or {}
    every = settings.get("every_n_train_steps", 500)
    said = trained_on(run)
    found: list[Any] = [ArtefactCheckpoint(run.checkpoints, every, said)]
    section = dict(run.lightning.get("best_step") or {})
    if section:
        from ldm.best_step import BestStep, BestStepConfig

        train = run.config.data.params.train.params
        words = {"class_word": said["class_word"] or "dog", "subject": train.get("subject", SUBJECT)}
        photos = Path(str(train.data_root))
        found.append(BestStep(BestStepConfig.read(section), run.directory, photos, every_n_train_steps=every, **words))
    return found
