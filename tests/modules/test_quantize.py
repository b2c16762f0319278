"""The quantiser against diffusers', which reads the same checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer as Peer

from ldm.modules import quantize
from ldm.modules.quantize import VectorQuantizer
from ldm.util import UserError
from tests.goldens.fill import data, fill


def latents() -> torch.Tensor:
    return data("vqz", (2, 3, 5, 4), 0.7).requires_grad_()


def both(**params: Any) -> list[torch.nn.Module]:
    """Ours and diffusers', with the same codebook of 16 entries."""
    modules = [fill(cls(16, 3, beta=0.25, **params)) for cls in (VectorQuantizer, Peer)]
    assert list(modules[0].state_dict()) == list(modules[1].state_dict())
    return modules


@pytest.mark.parametrize("params", [{}, {"legacy": False}, {"sane_index_shape": True}], ids=str)
def test_agrees_with_diffusers(params: dict[str, Any]) -> None:
    results = []
    for module in both(**params):
        z = latents()
        z_q, loss, (_, _, indices) = module(z)
        (z_q * data("vqg", z_q.shape)).sum().add(loss).backward()
        results.append((z_q, loss, indices, z.grad, module.embedding.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(results[0][2].unique()) > 3


def test_distances_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = both()[0]
    whole = module(latents())[2][2]
    monkeypatch.setattr(quantize, "DISTANCES_AT_ONCE", 16 * 7)
    assert torch.equal(module(latents())[2][2], whole)


@pytest.mark.parametrize("unknown", ["extra", 1])
def test_remapping_agrees_with_diffusers(tmp_path: Path, unknown: str | int) -> None:
    np.save(tmp_path / "used.npy", np.asarray([9, 3, 12, 0]))
    ours, theirs = both(remap=tmp_path / "used.npy", unknown_index=unknown)
    indices, expected = ours(latents())[2][2], theirs(latents())[2][2]
    assert ours.re_embed == theirs.re_embed and torch.equal(indices, expected)
    shape = (2, 5, 4, 3)
    torch.testing.assert_close(
        ours.get_codebook_entry(indices, shape), theirs.get_codebook_entry(expected.clone(), shape)
    )


def test_unknown_entries_become_random_used_ones(tmp_path: Path) -> None:
    np.save(tmp_path / "used.npy", np.asarray([9, 3, 12, 0]))
    ours = both(remap=tmp_path / "used.npy")[0]
    indices = torch.arange(16).repeat(50, 1)
    remapped = ours.remap_to_used(indices)
    assert all((remapped[:, entry] == place).all() for place, entry in enumerate([9, 3, 12, 0]))
    assert set(remapped[:, 1].tolist()) == {0, 1, 2, 3}


def test_wrong_remaps_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "used.npy", np.asarray([9, 16]))
    (tmp_path / "text.npy").write_text("no numbers")
    for name, problem in (("used.npy", "0 to 15"), ("text.npy", "cannot be read"), ("none.npy", "No such file")):
        with pytest.raises(UserError, match=f"{name}.*{problem}"):
            VectorQuantizer(16, 3, remap=tmp_path / name)
    np.save(tmp_path / "used.npy", np.asarray([9, 3]))
    with pytest.raises(UserError, match="unknown_index.*any"):
        VectorQuantizer(16, 3, remap=tmp_path / "used.npy", unknown_index="any")
