"""How far the student's sample is from the teacher's: l1, l2, or LPIPS of what the decoder makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import UserError
from ldm.modules.losses.lpips import LPIPS

CROP = 64  # latents along a side that LPIPS looks at: decoding more takes too much memory
PIXELS = {"l1": F.l1_loss, "l2": F.mse_loss}
Decode = Callable[[torch.Tensor], torch.Tensor]


class Distance(nn.Module):
    """A scalar from two batches of latents [B, C, h, w]; the second is the teacher's.

    Args:
        kind: l1, l2 or lpips.
        lpips_ckpt: file or files with LPIPS' weights.

    Raises:
        UserError: the kind is unknown, or LPIPS has no weights.
    """

    def __init__(self, kind: str = "l2", lpips_ckpt: str | Sequence[str] | None = None) -> None:
        super().__init__()
        if kind not in (*PIXELS, "lpips"):
            raise UserError(f"yaml: distillation_loss: '{kind}' is none of {', '.join(PIXELS)}, lpips")
        if kind == "lpips" and lpips_ckpt is None:
            raise UserError(
                "yaml: distillation_loss: lpips needs its weights: name the files of VGG-16 and LPIPS under "
                "model.params.lpips_ckpt, or take l2"
            )
        self.kind = kind
        self.lpips = LPIPS.from_files(lpips_ckpt) if kind == "lpips" else None

    def forward(self, output: torch.Tensor, target: torch.Tensor, decode: Decode) -> torch.Tensor:
        """The mean over the batch."""
        if self.lpips is None:
            return PIXELS[self.kind](output, target)
        with torch.no_grad():
            wanted = decode(centre(target))
        return self.lpips(wanted, decode(centre(output))).mean()


def centre(z: torch.Tensor, size: int = CROP) -> torch.Tensor:
    """The middle `size` x `size` of latents [B, C, h, w], or all of smaller ones."""
    top, left = (max(0, (side - size) // 2) for side in z.shape[-2:])
    return z[..., top : top + size, left : left + size]
