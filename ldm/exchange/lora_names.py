"""What the layers of a LoRA are called: here, in diffusers' files, and in kohya's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.exchange import text, unet
from ldm.exchange.layout import PREFIXES
from ldm.modules.lora import DOWN, UP

ALPHA = ".alpha"
UNET, TEXT = "unet.", "text_encoder."  # diffusers' two networks
KOHYA = {UNET: "lora_unet_", TEXT: "lora_te_"}
OUR_TEXT = "cond_stage_model.transformer."
# How the two matrices of a layer have been called, by diffusers over the years, and by kohya.
ENDS = ((".lora.down.weight", DOWN), (".lora.up.weight", UP), (".lora_linear_layer.down.weight", DOWN),
        (".lora_linear_layer.up.weight", UP), (".lora_down.weight", DOWN), (".lora_up.weight", UP))  # fmt: skip
PROCESSOR = re.compile(r"(\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


class LoraNames:
    """The names of a model's layers in files of LoRA.

    Ours are keys of the whole model: `model.diffusion_model.` or `cond_stage_model.transformer.`, a layer's name, and
    `.lora_A.weight` [r, in] or `.lora_B.weight` [out, r], as peft calls the two matrices.

    Args:
        params: the yaml's `model.params`, of which unet_config and cond_stage_config are looked at.
        layers: the names of the model's layers, which kohya's names, where "_" may be ".", are looked for in.
    """

    def __init__(self, params: Mapping[str, Any], layers: Iterable[str]) -> None:
        self._unet = unet.names(params["unet_config"]["params"])
        section = params.get("cond_stage_config")
        self.has_text = isinstance(section, Mapping) and _is_clip(section)
        self._flat: dict[str, str] = {}
        for layer in layers:
            theirs = self.theirs(layer)
            if theirs is not None:
                network = UNET if theirs.startswith(UNET) else TEXT
                for name in (theirs.removeprefix(network), layer.removeprefix(PREFIXES["unet"])):
                    self._flat[KOHYA[network] + name.replace(".", "_")] = layer

    def theirs(self, key: str) -> str | None:
        """diffusers' name for our `key`; None when it has none."""
        if key.startswith(PREFIXES["unet"]):
            name = self._unet.theirs(key.removeprefix(PREFIXES["unet"]))
            return None if name is None else UNET + name
        if self.has_text and key.startswith(OUR_TEXT):
            return TEXT + key.removeprefix(OUR_TEXT)
        return None

    def kohya(self, key: str) -> str | None:
        """kohya's name for our `key`; None when it has none."""
        theirs = self.theirs(key)
        if theirs is None:
            return None
        for ours, word in ((DOWN, ".lora_down.weight"), (UP, ".lora_up.weight"), (ALPHA, ALPHA)):
            if theirs.endswith(ours):
                network = UNET if theirs.startswith(UNET) else TEXT
                flat = theirs.removeprefix(network).removesuffix(ours).replace(".", "_")
                return KOHYA[network] + flat + word
        return None

    def ours(self, key: str) -> str | None:
        """Our name for a file's `key`, whoever wrote it; None when the model has no such layer."""
        key = _with_peft_ends(key.replace("lora_te1_", KOHYA[TEXT], 1))
        if key.startswith(tuple(KOHYA.values())):
            flat, _, end = key.partition(".")
            layer = self._flat.get(flat)
            return None if layer is None else f"{layer}.{end}"
        if key.startswith(UNET):
            name = self._unet.ours(key.removeprefix(UNET))
            return None if name is None else PREFIXES["unet"] + name
        if key.startswith(TEXT) and self.has_text:
            return OUR_TEXT + text.with_text_level(key.removeprefix(TEXT), "")
        return None


def _is_clip(section: Mapping[str, Any]) -> bool:
    return str(section.get("target")).rpartition(".")[2] == text.HUGGINGFACE.rpartition(".")[2]


def _with_peft_ends(key: str) -> str:
    """A key with peft's names of the matrices, of any file's."""
    match = PROCESSOR.search(key)
    if match:
        which = DOWN if match[3] == "down" else UP
        layer = f"{match[2]}_proj" if key.startswith(TEXT) else "to_out.0" if match[2] == "out" else f"to_{match[2]}"
        return f"{key[: match.start()]}.{layer}{which}"
    for theirs, ours in ENDS:
        if key.endswith(theirs):
            return key.removesuffix(theirs) + ours
    return key
