"""A personalisation from Python: what main_dream_booth.py does, as a function that returns what it left behind.

from ldm.personalize import personalise
result = personalise("configs/personalize/tiny-lora.yaml", "models/tiny/model.safetensors", "photos", "toy",
                     tell=lambda step, steps, loss: print(step, loss))
artefacts.use(model, dict.fromkeys(result.best or result.files, 1.0))
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import cli

Tell = Callable[[int, int, float], Any]


@dataclass(frozen=True)
class Result:
    """What a training left behind.

    Args:
        folder: the run's. steps: that were made. seconds: that it took. trained: how many parameters.
        files: the artefacts of the last step, for `ldm.artefacts.use`. best: those of the best step, where it was
            looked for, and best_step that step.
    """

    folder: Path
    steps: int
    seconds: float
    trained: int
    files: tuple[Path, ...]
    best: tuple[Path, ...] = ()
    best_step: int | None = None


def parser() -> cli.ArgumentParser:
    """The flags of main_dream_booth.py."""
    from ldm import dreambooth
    from ldm.run import add_flags

    parser = cli.ArgumentParser(
        description="Teach a model a new subject from a few photos: adapters, LoRA, a new word, or the networks."
    )
    add_flags(parser)
    dreambooth.add_flags(parser)
    return parser


def train(options: argparse.Namespace, tell: Tell | None = None, callbacks: Sequence[Any] = ()) -> Result:
    """Train as the flags of `parser` say.

    Args:
        tell: called after every step with its number, how many there will be, and the loss; what it returns, if true,
            ends the training there, with everything saved.
        callbacks: Lightning's, beside the usual ones.

    Raises:
        UserError: a flag, a file or a setting is wrong.
    """
    from ldm import dreambooth, prior_images, training
    from ldm.run import read_run

    dreambooth.check_flags(options)
    run = read_run(options, prefix=dreambooth.run_prefix(options))
    dreambooth.apply_flags(run)
    prior_images.for_run(run)

    def extra_callbacks(model: Any) -> list[Any]:
        return [*dreambooth.callbacks(run, model), *([_teller(tell)] if tell else []), *callbacks]

    start = time.perf_counter()
    trainer = training.train(run, extra_callbacks=extra_callbacks)
    trained = sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad) if options.train else 0
    return _result(run.directory, trainer.global_step, time.perf_counter() - start, trained)


def _teller(tell: Tell) -> Any:
    from pytorch_lightning.callbacks import Callback

    class Teller(Callback):
        """Tells of every step, and ends the training when it is told to."""

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            if tell(trainer.global_step, trainer.max_steps, float(loss)):
                trainer.should_stop = True

    return Teller()


def _result(folder: Path, steps: int, seconds: float, trained: int) -> Result:
    from ldm.best_step import best_of_run

    checkpoints = folder / "checkpoints"

    def named(name: str) -> tuple[Path, ...]:
        pattern = re.compile(rf"{name}-(adapters|(lora|embedding|weights)\.safetensors)")
        return tuple(sorted(path for path in checkpoints.glob(f"{name}-*") if pattern.fullmatch(path.name)))

    best = best_of_run(folder)
    return Result(folder, steps, seconds, trained, named(str(steps)), named("best"), best.step if best else None)


def personalise(
    base: str | Path,
    ckpt: str | Path,
    photos: str | Path,
    class_word: str,
    *,
    priors: str | Path | None = None,
    num_priors: int | None = None,
    steps: int | None = None,
    seed: int = 23,
    name: str = "subject",
    logdir: str | Path = "logs",
    overrides: Sequence[str] = (),
    flags: Sequence[str] = (),
    tell: Tell | None = None,
    callbacks: Sequence[Any] = (),
) -> Result:
    """Teach the model in `ckpt` the subject of `photos`.

    Args:
        base: the method's yaml, of configs/personalize or configs/sd-inject-dreambooth.
        priors, num_priors: the folder of prior images, and how many there are to be; what is lacking is drawn.
        overrides: `key.subkey=value`, over the yaml. flags: others of main_dream_booth.py.
        tell, callbacks: see `train`.

    Raises:
        UserError: a file or a setting is wrong.
    """
    words = ["--base", base, *overrides, "-t", "--scale_lr", "False", "--actual_resume", ckpt, "-n", name,
             "--seed", seed, "--data_root", photos, "--class_word", class_word, "--logdir", logdir]  # fmt: skip
    words += ["--reg_data_root", priors] if priors is not None else []
    words += ["--num_reg_images", num_priors] if num_priors is not None else []
    words += ["--max_steps", steps] if steps is not None else []
    return train(parser().parse_intermixed_args([str(word) for word in [*words, *flags]]), tell, callbacks)
