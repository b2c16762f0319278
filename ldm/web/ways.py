"""The ways to train that the page offers: the repository's yaml files that fit the loaded model, and a person's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.util import load_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Title -> in a few words, and its yaml for each of `MODELS`.
WAYS = {
    "Adapters": ("small layers beside the U-Net's", ("sd-inject-dreambooth/attn2o-ffni", "tiny/dreambooth")),
    "LoRA": ("low-rank changes of the U-Net", ("personalize/lora", "personalize/tiny-lora")),
    "LoRA, text too": ("of the text encoder as well", ("personalize/lora-text", "personalize/tiny-lora-text")),
    "New word": ("the model stays as it is", ("personalize/embedding", "personalize/tiny-embedding")),
    "New word and LoRA": ("both at once", ("personalize/pivotal", "personalize/tiny-pivotal")),
    "U-Net": ("all of it: a large file", ("personalize/unet", "personalize/tiny-unet")),
    "U-Net and text": ("and the text encoder: larger still", ("personalize/unet-text", "personalize/tiny-unet-text")),
}
MODELS = ("stable-diffusion/v1-inference", "tiny/dreambooth")  # what the yaml files above are of
OWN = "As in {}"  # of --train_base


@dataclass(frozen=True)
class Way:
    """One of them.

    Args:
        title: its name on the page. about: what it is. base: its yaml. steps: what the yaml trains. word: whether the
            subject gets a new word.
    """

    title: str
    about: str
    base: Path
    steps: int
    word: bool


def offered(config: Mapping[str, Any], own: str | None) -> dict[str, Way]:
    """Title -> way, the first of them the usual one.

    Args:
        config: the loaded model's yaml. own: --train_base, which is taken to fit.
    """
    found = [_read(OWN.format(Path(own).name), "the yaml of --train_base", Path(own))] if own else []
    for i, model in enumerate(MODELS):
        if fits(config, load_yaml(_path(model))):
            found += [_read(title, about, _path(names[i])) for title, (about, names) in WAYS.items()]
    return {way.title: way for way in found}


def _path(name: str) -> Path:
    return CONFIGS / f"{name}.yaml"


def fits(config: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether both yaml files are of the same U-Net, adapters apart, and of the same objective."""

    def network(of: Mapping[str, Any]) -> tuple[Any, Any]:
        params = of["model"]["params"]
        unet = {key: value for key, value in params["unet_config"]["params"].items() if key != "adapter_config"}
        return unet, params.get("parameterization", "eps")

    return network(config) == network(base)


def _read(title: str, about: str, base: Path) -> Way:
    from omegaconf import OmegaConf

    config = load_yaml(base)
    levels = OmegaConf.select(config, "model.params.train_level") or []
    steps = OmegaConf.select(config, "lightning.trainer.max_steps") or 500
    return Way(title, about, base, steps, "embeder" in levels)
