"""How well pictures fit their captions, by a CLIP model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from ldm.util import UserError

CLIP = "openai/clip-vit-large-patch14"


def load(name: str, device: torch.device) -> Callable[[Sequence[Image.Image], Sequence[str]], torch.Tensor]:
    """A function (pictures, captions) -> scores [B]: 100 times the cosine of their embeddings, at least 0.

    That is CLIP score as torchmetrics and most papers have it (Hessel et al., 2021, with a weight of 100).

    Args:
        name: a folder in transformers' form, or a name on the model hub.

    Raises:
        UserError: there is no such model.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(name).to(device).eval()
        processor = CLIPProcessor.from_pretrained(name)
    except Exception as error:  # the hub's client raises many types
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--clip: '{name}' is no folder with a CLIP model, and the hub gives none: {reason}") from error

    @torch.inference_mode()
    def score(pictures: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
        inputs = processor(
            text=list(captions), images=list(pictures), return_tensors="pt", padding=True, truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
        ).to(device)  # fmt: skip
        found = model(**inputs)
        return 100 * torch.cosine_similarity(found.image_embeds, found.text_embeds).clamp(min=0).cpu()

    return score
