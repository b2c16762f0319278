"""Vector quantisation: every latent vector is replaced by the nearest of a codebook (van den Oord et al., 2017)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import UserError

DISTANCES_AT_ONCE = 2**25  # of vectors to codebook entries: 128 MB


class VectorQuantizer(nn.Module):
    """Latents [B, e_dim, H, W] -> the same with the nearest of `n_e` codebook entries at every place.

    Keys and numbers are those of CompVis' VectorQuantizer2.

    Args:
        beta: weight of the commitment term. legacy: put it on the codebook's term instead, as the published
            models were trained.
        remap: a .npy file with the entries that are used; indices then count those alone.
        unknown_index: what an index that is not among them becomes: `random`, `extra` (one more) or a number.
        sane_index_shape: indices are [B, H, W] instead of flat.

    Raises:
        UserError: `remap` or `unknown_index` is wrong.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: str | os.PathLike[str] | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.remap, self.re_embed, self.unknown_index = remap, n_e, unknown_index
        if remap is not None:
            self.register_buffer("used", _read_used(remap, n_e))
            self.re_embed = len(self.used)
            if unknown_index == "extra":
                self.unknown_index, self.re_embed = self.re_embed, self.re_embed + 1
            elif unknown_index != "random" and not isinstance(unknown_index, int):
                raise UserError(f"yaml: unknown_index: '{unknown_index}' is neither random, extra nor a number")

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Numbers [N] of the entries nearest to vectors [N, e_dim]; the distances never all exist at once."""
        codes = self.embedding.weight.detach().float()
        norms = codes.square().sum(1)
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            parts = vectors.detach().float().split(max(1, DISTANCES_AT_ONCE // self.n_e))
            return torch.cat([torch.addmm(norms, part, codes.t(), alpha=-2).argmin(1) for part in parts])

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[None, None, torch.Tensor]]:
        """Quantised latents, through which gradients pass straight, the scalar loss, (None, None, indices)."""
        vectors = z.permute(0, 2, 3, 1)
        indices = self.nearest(vectors.reshape(-1, self.e_dim))
        z_q = self.embedding(indices).view(vectors.shape).permute(0, 3, 1, 2)
        commitment, codebook = F.mse_loss(z, z_q.detach()), F.mse_loss(z_q, z.detach())
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        z_q = (z + (z_q - z).detach()).contiguous()
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if self.sane_index_shape:
            indices = indices.view(len(z), *z.shape[2:])
        elif self.remap is not None:
            indices = indices[:, None]
        return z_q, loss, (None, None, indices)

    def remap_to_used(self, indices: torch.Tensor) -> torch.Tensor:
        """Places among the used entries, of any shape, for numbers of entries."""
        places = torch.full((self.n_e,), -1, device=indices.device)
        places[self.used] = torch.arange(len(self.used), device=indices.device)
        places = places[indices]
        if self.unknown_index == "random":
            unknown = torch.randint_like(places, self.re_embed)
        else:
            unknown = torch.full_like(places, self.unknown_index)
        return torch.where(places < 0, unknown, places)

    def unmap_to_all(self, indices: torch.Tensor) -> torch.Tensor:
        """Numbers of entries for places among the used ones; an `extra` place is taken for the first."""
        return self.used[torch.where(indices >= len(self.used), 0, indices)]

    def get_codebook_entry(self, indices: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
        """Entries [N, e_dim] for indices, or [B, e_dim, H, W] with `shape` (B, H, W, e_dim)."""
        indices = indices.reshape(-1)
        z_q = self.embedding(self.unmap_to_all(indices) if self.remap is not None else indices)
        return z_q if shape is None else z_q.view(*shape).permute(0, 3, 1, 2).contiguous()


def _read_used(path: str | os.PathLike[str], n_e: int) -> torch.Tensor:
    try:
        used = torch.from_numpy(np.load(path, allow_pickle=False)).long()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"yaml: remap: '{path}' cannot be read as .npy: {' '.join(str(error).split())}") from error
    if used.ndim != 1 or not len(used) or used.min() < 0 or used.max() >= n_e:
        raise UserError(f"yaml: remap: '{path}' must hold numbers of the codebook's entries, 0 to {n_e - 1}")
    return used
