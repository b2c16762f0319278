"""Models by their name on a model hub: `--ckpt owner/name`."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import UserError

# A diffusers pipeline's own files: no second copies in other formats, no checker (it has a flag of its own).
FILES = ["model_index.json", "*/*.json", "*/*.txt"]
WEIGHTS = ("safetensors", "bin")
OTHERS = ["safety_checker/*", "*/*fp16*", "*/*non_ema*", "*/*flax*", "*/*openvino*", "*/*onnx*"]


def model_folder(name: str) -> str:
    """The folder with a hub's model: from the hub client's cache, or else downloaded there.

    Raises:
        UserError: it is not in the cache and cannot be had.
    """
    from huggingface_hub import snapshot_download

    reason = ""
    for kept in (True, False):
        for weights in WEIGHTS:
            patterns = [*FILES, f"*/*.{weights}"]
            try:
                folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=OTHERS, local_files_only=kept)
            except Exception as error:  # the hub's client raises many types
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
                continue
            if list(Path(folder).glob(f"*/*.{weights}")):
                return folder
            reason = "it holds no pipeline that diffusers wrote"
    raise UserError(f"--ckpt: there is no file '{name}', and the model hub gives none of that name ({reason})")
