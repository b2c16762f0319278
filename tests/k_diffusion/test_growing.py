"""Growing: a larger network starts from a smaller one's weights, and begins by doing what that did."""

import pytest
import torch
import torch.nn.functional as F

from ldm.errors import UserError
from ldm.k_diffusion.growing import grow, skipped_of
from ldm.k_diffusion.models.image_v1 import ImageDenoiserModelV1
from ldm.k_diffusion.models.layers import Downsample2d, Upsample2d
from tests.goldens.fill import data, fill

INNER = dict(c_in=3, feats_in=16, depths=[1, 1], channels=[32, 64], self_attn_depths=[False, True])
OUTER = dict(c_in=3, feats_in=16, depths=[2, 1, 1], channels=[32, 32, 64], self_attn_depths=[True, False, True])
X, SIGMA = data("x", (2, 3, 16, 16)), torch.tensor([0.3, 20.0])


@pytest.fixture
def saved(tmp_path):
    """Saves a network's weights as a training checkpoint does; the file's name."""

    def save(network, averaged=None):
        state = {f"model.inner_model.inner_model.{key}": value for key, value in network.state_dict().items()}
        for name, value in (averaged or network).named_parameters():
            state["model_ema." + f"inner_model.inner_model.{name}".replace(".", "")] = value.detach()
        torch.save({"state_dict": state}, tmp_path / "small.ckpt")
        return tmp_path / "small.ckpt"

    return save


def lower_resolution_of(network, x):
    """What a network for half the size makes of x; its first and last layers, which see pixels alone, work at x's."""
    seen = Downsample2d()(x)
    return Upsample2d()(network(seen, SIGMA))


def test_new_levels_in_front_begin_as_a_change_of_size(saved):
    small, large = fill(ImageDenoiserModelV1(**INNER)).eval(), ImageDenoiserModelV1(**OUTER).eval()
    grow(large, saved(small))
    torch.testing.assert_close(large(X, SIGMA), lower_resolution_of(small, X), rtol=1e-4, atol=1e-4)


def test_a_level_that_was_skipped_begins_so_too(saved, capsys):
    small = fill(ImageDenoiserModelV1(**OUTER, skip_stages=1)).eval()
    large = ImageDenoiserModelV1(**OUTER).eval()
    assert skipped_of(small.state_dict()) == 1 and skipped_of(large.state_dict()) == 0
    grow(large, saved(small))
    torch.testing.assert_close(large(X, SIGMA), lower_resolution_of(small, X), rtol=1e-4, atol=1e-4)
    assert "1 new level" in capsys.readouterr().out


def test_averaged_weights_are_taken(saved):
    small, averaged = (fill(ImageDenoiserModelV1(**INNER), prefix) for prefix in ("a", "b"))
    large = ImageDenoiserModelV1(**OUTER)
    grow(large, saved(small, averaged))
    assert torch.equal(large.u_net.d_blocks[2][1].main[2].weight, averaged.u_net.d_blocks[1][1].main[2].weight)


def test_larger_patches_keep_the_levels_and_start_their_ends_anew(saved, capsys):
    small, large = fill(ImageDenoiserModelV1(**INNER)), ImageDenoiserModelV1(**INNER, patch_size=2)
    grow(large, saved(small))
    assert "proj_in and proj_out start anew" in capsys.readouterr().out
    assert not large(F.interpolate(X, scale_factor=2), SIGMA).any()
    assert torch.equal(large.u_net.d_blocks[0][1].main[2].weight, small.u_net.d_blocks[0][1].main[2].weight)


def test_augmentation_may_be_new(saved):
    small = fill(ImageDenoiserModelV1(**INNER)).eval()
    large = ImageDenoiserModelV1(**OUTER, mapping_cond_dim=9).eval()
    grow(large, saved(small))
    found = large(X, SIGMA, mapping_cond=torch.ones(2, 9))
    torch.testing.assert_close(found, lower_resolution_of(small, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings, said", [
    (OUTER | {"channels": [32, 64, 64]}, r"do not fit the inner levels of this network, such as u_net"),
    (INNER | {"depths": [1], "channels": [64], "self_attn_depths": [True]}, "uses 2 levels, this network only 1"),
    (INNER | {"skip_stages": 1}, "uses 2 levels, this network only 1; add levels in front, or lower skip_stages"),
])  # fmt: skip
def test_what_does_not_go_together_is_said(settings, said, saved):
    with pytest.raises(UserError, match=said):
        grow(ImageDenoiserModelV1(**settings), saved(ImageDenoiserModelV1(**INNER)))


def test_other_files_and_networks_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="holds no image_v1 network"):
        grow(ImageDenoiserModelV1(**INNER), tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="a Linear cannot be grown"):
        grow(torch.nn.Linear(1, 1), tmp_path / "other.ckpt")
