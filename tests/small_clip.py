"""A random CLIP of a few hundred thousand numbers, as a folder of open_clip's."""

from __future__ import annotations

import json
from pathlib import Path

SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_clip(folder: Path) -> Path:
    """The folder, which is made: config and weights."""
    import torch
    from open_clip import CLIP
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SIZES, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(CLIP(**SIZES).state_dict(), folder / "open_clip_model.safetensors")
    return folder
