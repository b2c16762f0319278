"""The text encoder: CLIP under the names of transformers (SD v1) and of open_clip (SD v2), and its config.json.

transformers' names are the folder's and, behind `transformer.`, those of FrozenCLIPEmbedder. open_clip keeps query,
key and value of an attention in one matrix, and holds a last block, a projection and a temperature of which
FrozenOpenCLIPEmbedder's "penultimate" output needs none: diffusers' folders leave them out.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.errors import UserError
from ldm.exchange.names import Names, require
from ldm.modules.encoders.modules import COMMON, SD_V1_ARCHITECTURE
from ldm.weight_files import StateDict, with_text_level

WHERE_YAML = "yaml: cond_stage_config"
WHERE_JSON = "text_encoder/config.json"
HUGGINGFACE = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
OPEN_CLIP = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
SD_V2_ARCH = "ViT-H-14"
OPEN_CLIP_DEFAULTS = {
    "context_length": 77,
    "vocab_size": COMMON["vocab_size"],
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

OUTSIDE = (
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
)
BLOCK = (
    ("ln_1", "layer_norm1"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
UNUSED = ("text_projection", "logit_scale", "attn_mask")  # of open_clip, by every text-to-image model
IN_PROJECTION = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
PARTS = ("q_proj", "k_proj", "v_proj")


# ---- configurations ----------------------------------------------------------------------------------------


def is_open_clip(section: Mapping[str, Any]) -> bool:
    """Whether a `cond_stage_config` names open_clip's encoder.

    Raises:
        UserError: it names no encoder of texts that diffusers knows.
    """
    target = str(section.get("target"))
    for known in (HUGGINGFACE, OPEN_CLIP):
        if target.rpartition(".")[2] == known.rpartition(".")[2]:
            return known == OPEN_CLIP
    raise UserError(f"{WHERE_YAML}: {target} has no counterpart in diffusers' Stable Diffusion")


def open_clip_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of open_clip's model, as it writes them: `architecture`, or what it has under the name `arch`.

    Raises:
        UserError: it has no such model, or transformers' CLIP cannot be it.
    """
    config = dict(params.get("architecture") or {})
    if not config:
        arch = params.get("arch", SD_V2_ARCH)
        spec = importlib.util.find_spec("open_clip")  # importing it takes seconds
        path = Path(spec.origin).parent / "model_configs" / f"{arch}.json" if spec and spec.origin else None
        if path is None or not path.is_file():
            raise UserError(f"{WHERE_YAML}: arch: open_clip has no model '{arch}'")
        config = json.loads(path.read_text(encoding="utf-8"))
    require(config, {"quick_gelu": False}, f"{WHERE_YAML}: architecture")
    config["text_cfg"] = OPEN_CLIP_DEFAULTS | dict(config["text_cfg"])
    return config


def to_diffusers(section: Mapping[str, Any]) -> dict[str, Any]:
    """`text_encoder/config.json` for our `cond_stage_config`."""
    params = dict(section.get("params") or {})
    if is_open_clip(section):
        sizes = open_clip_config(params)["text_cfg"]
        settings = COMMON | {
            "vocab_size": sizes["vocab_size"],
            "hidden_size": sizes["width"],
            "intermediate_size": int(sizes["mlp_ratio"] * sizes["width"]),
            "num_hidden_layers": layers_that_count(section),
            "num_attention_heads": sizes["heads"],
            "max_position_embeddings": sizes["context_length"],
            "hidden_act": "gelu",
            "projection_dim": 512,
        }
    else:
        settings = COMMON | {"max_position_embeddings": params.get("max_length", 77)}
        settings |= params.get("architecture") or SD_V1_ARCHITECTURE
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "layer_norm_eps": 1e-5, **settings}


def layers_that_count(section: Mapping[str, Any]) -> int:
    """The number of open_clip's blocks that the encoder's output depends on."""
    params = dict(section.get("params") or {})
    return open_clip_config(params)["text_cfg"]["layers"] - (params.get("layer", "last") == "penultimate")


def from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `cond_stage_config` for a `text_encoder/config.json`.

    The activation tells SD v1's encoder (quick_gelu, OpenAI's) from v2's (gelu, open_clip's).

    Raises:
        UserError: it is no CLIP text encoder of Stable Diffusion v1 or v2.
    """
    require(config, {"model_type": "clip_text_model"}, WHERE_JSON)
    missing = [key for key in SIZES if key not in config]
    if missing:
        raise UserError(f"{WHERE_JSON}: there is no {missing[0]}")
    activation, length = config.get("hidden_act", "quick_gelu"), config.get("max_position_embeddings", 77)
    if activation == "gelu":
        sizes = {
            "context_length": length,
            "vocab_size": config["vocab_size"],
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "layers": config["num_hidden_layers"] + 1,
            "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        }
        params: dict[str, Any] = {"freeze": True, "layer": "penultimate"}
        params |= {} if length == 77 else {"max_length": length}
        if sizes != open_clip_config({})["text_cfg"]:
            params["architecture"] = {"embed_dim": config["hidden_size"], "quick_gelu": False, "text_cfg": sizes}
        return {"target": OPEN_CLIP, "params": params}
    require({"hidden_act": activation}, {"hidden_act": "quick_gelu"}, WHERE_JSON)
    architecture = {key: config[key] for key in SIZES if config[key] != COMMON.get(key)}
    standard = {k: v for k, v in SD_V1_ARCHITECTURE.items() if k in SIZES and v != COMMON.get(k)}
    params = {} if length == 77 else {"max_length": length}
    if architecture != standard:
        params["architecture"] = architecture
    return {"target": HUGGINGFACE, **({"params": params} if params else {})}


# ---- weights -----------------------------------------------------------------------------------------------


def _names(layers: int) -> Names:
    """open_clip's names (ours) and transformers' (theirs), without the joined attention matrices."""
    pairs = list(OUTSIDE)
    for layer in range(layers):
        here, there = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        pairs += [(f"{here}.{a}", f"{there}.{b}") for a, b in BLOCK]
    return Names(pairs)


def weights_to_diffusers(state: StateDict, section: Mapping[str, Any]) -> tuple[StateDict, list[str]]:
    """(the text encoder's weights under transformers' names, keys that nothing is known of).

    `state` is what lies under `cond_stage_model.`, with that prefix taken off.
    """
    if not is_open_clip(section):
        found = {k.removeprefix("transformer."): v for k, v in state.items() if not k.endswith("position_ids")}
        unknown = [key for key in found if not key.startswith("text_model.")]
        return {k: v for k, v in found.items() if k not in unknown}, unknown
    layers = layers_that_count(section)
    names, out, unknown = _names(layers), {}, []
    for key, value in state.items():
        name = key.removeprefix("model.")
        joined = IN_PROJECTION.fullmatch(name)
        block = re.match(r"transformer\.resblocks\.(\d+)\.", name)
        if name in UNUSED or (block and int(block[1]) >= layers):
            continue
        if joined:
            for part, piece in zip(PARTS, value.chunk(3), strict=True):
                out[f"text_model.encoder.layers.{joined[1]}.self_attn.{part}.{joined[2]}"] = piece
        elif (theirs := names.theirs(name)) is not None:
            out[theirs] = value
        else:
            unknown.append(key)
    return out, unknown


def weights_from_diffusers(state: StateDict, section: Mapping[str, Any]) -> tuple[StateDict, list[str]]:
    """(the weights as they lie under `cond_stage_model.`, keys that nothing is known of).

    What a folder lacks of open_clip's model, because no output depends on it, is filled with zeros.
    """
    state = {with_text_level(k, ""): v for k, v in state.items() if not k.endswith("position_ids")}
    if not is_open_clip(section):
        unknown = [key for key in state if not key.startswith("text_model.")]
        return {f"transformer.{k}": v for k, v in state.items() if k not in unknown}, unknown
    layers = layers_that_count(section)
    names, out, unknown = _names(layers), {}, []
    for layer in range(layers):
        for kind in ("weight", "bias"):
            pieces = [state.pop(f"text_model.encoder.layers.{layer}.self_attn.{p}.{kind}", None) for p in PARTS]
            if all(piece is not None for piece in pieces):
                out[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(pieces)
    for key, value in state.items():
        ours = names.ours(key)
        if ours is None:
            unknown.append(key)
        else:
            out[ours] = value
    return with_unused({f"model.{k}": v for k, v in out.items()}, section), unknown


def with_unused(state: StateDict, section: Mapping[str, Any], prefix: str = "") -> StateDict:
    """`state` with zeros for what it lacks of open_clip's text encoder and no output depends on.

    Files that were made from diffusers' folders lack it. `prefix` is what the encoder's keys begin with.
    """
    begin = f"{prefix}model.transformer.resblocks.0."
    first = {k: v for k, v in state.items() if k.startswith(begin)}
    if not first or str(section.get("target")).rpartition(".")[2] != OPEN_CLIP.rpartition(".")[2]:
        return state
    config = open_clip_config(dict(section.get("params") or {}))
    unused = range(layers_that_count(section), config["text_cfg"]["layers"])
    zeros = {k.replace(".0.", f".{i}.", 1): torch.zeros_like(v) for i in unused for k, v in first.items()}
    like = next(iter(first.values()))
    zeros[f"{prefix}model.text_projection"] = like.new_zeros(config["text_cfg"]["width"], config["embed_dim"])
    zeros[f"{prefix}model.logit_scale"] = like.new_zeros(())
    return zeros | state
