"""Attention in slices is exact; decoding in tiles is close, seamless, and looks at one tile at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder
from ldm.modules.diffusionmodules.unet_blocks import AttentionBlock
from ldm.modules.tiling import attention, slice_attention, tiled
from tests.goldens.fill import data, fill

DECODER = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "in_channels": 3,
    "resolution": 32,
    "z_channels": 4,
}


@pytest.mark.parametrize("slice_size", [1, 7, 64, 100])
def test_slices_change_nothing(slice_size: int) -> None:
    q, k, v = data("q", (2, 3, 50, 8)), data("k", (2, 3, 9, 8)), data("v", (2, 3, 9, 8))
    whole = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(attention(q, k, v, slice_size), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_kind_of_attention_is_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    attentions = [CrossAttention(32, heads=2, dim_head=16), AttnBlock(32), AttentionBlock(32, 2)]
    model = fill(torch.nn.ModuleList(attentions))
    inputs = data("x", (2, 64, 32)), data("image", (2, 32, 8, 8)), data("image", (2, 32, 8, 8))

    def run() -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(model, inputs, strict=True)]

    whole = run()
    queries = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v: (queries.append(q.shape[-2]), plain(q, k, v))[1]
    )
    slice_attention(model, 24)
    torch.testing.assert_close(run(), whole, atol=1e-5, rtol=1e-5)
    assert queries == [24, 24, 16] * 3
    slice_attention(model, None)
    run()
    assert queries[-3:] == [64] * 3


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (17, 40), (40, 9), (33, 21)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_tiles_of_a_local_function_are_the_whole(size: tuple[int, int], overlap: float) -> None:
    z = data("z", (2, 4, *size))
    seen = []

    def enlarge(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[-2:])
        return F.interpolate(part, scale_factor=4, mode="nearest") * 3 - 1

    torch.testing.assert_close(tiled(enlarge, z, tile=16, overlap=overlap), enlarge(z), atol=1e-5, rtol=1e-5)
    parts = seen[:-1]
    assert len(set(parts)) == 1 and max(parts[0]) <= 16
    shared = int(16 * overlap)
    for side, length in zip(size, parts[0], strict=True):  # no tile more, and none longer, than are needed
        count = next(n for n in range(1, 99) if n * 16 - (n - 1) * shared >= side)
        assert count * length - (count - 1) * shared < side + count
        assert len(parts) % count == 0


@torch.no_grad()
def test_a_decoder_in_tiles_is_close() -> None:
    decoder, z = fill(Decoder(**DECODER)).eval(), data("z", (1, 4, 48, 48))
    whole, made = decoder(z), tiled(decoder, z, tile=24)
    assert made.shape == whole.shape == (1, 3, 192, 192)
    without = tiled(decoder, z, tile=24, overlap=0.0)
    error, error_without = ((image - whole).abs() / whole.std() for image in (made, without))
    assert error.mean() < 0.2
    assert error.max() < 0.5 * error_without.max()
    assert tiled(decoder, z[..., :24, :24], tile=24).equal(decoder(z[..., :24, :24]))


@torch.no_grad()
def test_tiles_have_no_seams() -> None:
    decoder = fill(Decoder(**DECODER)).eval()
    z = F.interpolate(data("z", (1, 4, 12, 12)), size=(48, 48), mode="bicubic")
    whole, made = decoder(z), tiled(decoder, z, tile=24)
    without = tiled(decoder, z, tile=24, overlap=0.0)  # neighbours meet at 96

    def steps(image: torch.Tensor) -> torch.Tensor:
        """How much neighbouring columns differ, beside those of the whole."""
        made, expected = ((x[..., 1:] - x[..., :-1]).abs().mean((0, 1, 2)) for x in (image, whole))
        return made / expected

    assert steps(made).max() < 1.5 and steps(without)[95] > 2
