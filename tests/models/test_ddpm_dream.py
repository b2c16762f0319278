"""DreamBooth training: what is trained, the loss of one pass, and what is encoded only once."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.dreambooth import DataModuleFromConfig, Pairs, encode_photos
from ldm.data.personalized_dream import PersonalizedBase
from ldm.models.diffusion.ddpm_dream import LatentDiffusion
from ldm.modules.randomness import SampleRandom
from ldm.util import UserError
from tests.goldens.fill import data

ADAPTERS = {"transformer_adp_config": [{"type": "inout", "din": "attn2o", "dout": "ffni", "mid_dim": 6}]}
UNET = dict(
    image_size=8, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[1], num_res_blocks=1,
    channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, context_dim=32, legacy=False, use_checkpoint=False,
)  # fmt: skip
DDCONFIG = dict(
    double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1], num_res_blocks=1,
    attn_resolutions=[], dropout=0.0,
)  # fmt: skip
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def dream(adapters=ADAPTERS, **params):
    torch.manual_seed(0)
    unet = dict(target="ldm.modules.diffusionmodules.openaimodel.UNetModel", params=UNET)
    if adapters:
        unet = dict(
            target="ldm.modules.diffusionmodules.openaimodel_inject.UNetModel_inject",
            params={**UNET, "adapter_config": adapters},
        )
    return LatentDiffusion(
        unet_config=unet,
        first_stage_config=dict(
            target="ldm.models.autoencoder.AutoencoderKL",
            params=dict(ddconfig=DDCONFIG, embed_dim=4, lossconfig={"target": "torch.nn.Identity"}),
        ),
        cond_stage_config=dict(
            target="ldm.modules.encoders.modules.FrozenCLIPEmbedder", params={"architecture": TEXT}
        ),
        cond_stage_key="caption", conditioning_key="crossattn", image_size=8, channels=4, cond_stage_trainable=True,
        linear_start=0.00085, linear_end=0.012, **params,
    )  # fmt: skip


def pair(instances=2, priors=3):
    return {
        "instance": {
            "moments": data("i", (instances, 8, 8, 8)),
            "caption": ["a photo of a sks toy"] * instances,
        },
        "prior": {"moments": data("p", (priors, 8, 8, 8)), "caption": ["a photo of a toy"] * priors},
    }


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return PersonalizedBase(str(tmp_path), size=32, repeats=4, placeholder_token="toy")


def test_one_pass_has_the_loss_of_two():
    model = dream(reg_weight=0.7).eval()
    for p in model.model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    batch = pair()
    loss, logs = model.shared_step(batch, SampleRandom(0, 0, 0, 5, "cpu"))
    random = SampleRandom(0, 0, 0, 5, "cpu")
    z, c, n = model.training_batch(batch, random)
    t, noise = random.randint(1000), random.randn_like(z)
    # draws are made in the order latents, timesteps, noise
    with torch.no_grad():
        parts = []
        for part in (slice(0, n), slice(n, None)):
            x_t = model.q_sample(z[part], t[part], noise[part])
            context = model.cond_stage_model((batch["instance"]["caption"] + batch["prior"]["caption"])[part])
            parts.append(((model.model.diffusion_model(x_t, t[part], context=context) - noise[part]) ** 2).mean())
    torch.testing.assert_close(loss, parts[0] + 0.7 * parts[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logs["val/loss_prior"], parts[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [["adapter"], ["unet"], ["adapter", "unet"]])
def test_only_what_train_level_names_is_trained(levels):
    model = dream(train_level=levels).train()
    torch.nn.init.normal_(model.model.diffusion_model.out[2].weight, std=0.1)  # zero in a new network: no gradients
    for layer in model.model.modules():
        if hasattr(layer, "proj_out"):
            torch.nn.init.normal_(layer.proj_out.weight, std=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    for step in range(2):
        loss, _ = model.shared_step(pair(), SampleRandom(0, step, 0, 5, "cpu"))
        loss.backward()
        optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    kinds = {"adapter" if "adapter_inout" in k else "unet" for k in changed}
    assert kinds == set(levels)
    assert all(k.startswith("model.diffusion_model.") for k in changed)


def test_what_is_frozen_stays_in_eval_mode_and_is_not_averaged():
    model = dream(use_ema=True).train()
    modes = {name: module.training for name, module in model.model.diffusion_model.named_modules()}
    assert any(modes.values()) and all("adapter_inout" in name for name, training in modes.items() if training)
    averaged = set(model.model_ema.m_name2s_name)
    assert averaged == {name for name, p in model.model.named_parameters() if p.requires_grad}
    with model.ema_scope():
        pass
    whole = dream(train_level=["unet"]).train()
    assert whole.model.diffusion_model.out.training and not whole.first_stage_model.training


def test_a_new_adapter_changes_nothing():
    batch = pair()
    plain, adapted = dream(adapters=None, train_level="unet"), dream()
    adapted.load_state_dict(plain.state_dict(), strict=False)
    losses = [m.shared_step(batch, SampleRandom(0, 0, 0, 5, "cpu"))[0] for m in (plain, adapted)]
    assert torch.equal(*losses)


def test_photos_are_encoded_once_and_give_what_direct_encoding_gives(photos):
    model = dream()
    encoded = encode_photos(photos, model.first_stage_model, "train")
    flips = set()
    for item in range(len(photos)):
        direct = model.encode_images({"image": torch.from_numpy(photos[item]["image"])[None]})[0]
        torch.testing.assert_close(encoded[item]["moments"], direct, rtol=1e-4, atol=1e-5)
        assert encoded[item]["caption"] == "a photo of a sks toy"
        flips.add(photos.choose(item)[1])
    assert flips == {False, True}
    calls = []
    model.cond_stage_model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        model.shared_step(pair())
    assert len(calls) == 2  # one for each of the two captions


def test_latents_are_drawn_afresh():
    model = dream()
    batch = pair()
    draws = [model.training_batch(batch, SampleRandom(0, step, 0, 5, "cpu"))[0] for step in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_priors_go_round_and_may_be_missing():
    pairs = Pairs(list("abcde"), [1, 2])
    assert [pairs[i]["prior"] for i in range(5)] == [1, 2, 1, 2, 1] and len(pairs) == 5
    assert "prior" not in Pairs(list("ab"))[0]
    batch = {"instance": pair()["instance"]}
    loss, logs = dream().shared_step(batch)
    assert loss.isfinite() and "train/loss_prior" not in logs


def test_checkpoints_of_adapter_training_are_small():
    model = dream()
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"] and all("adapter_inout" in k for k in checkpoint["state_dict"])
    model = dream(train_level=["unet"])
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == set(model.state_dict())


@pytest.mark.parametrize(
    "params, message",
    [
        ({"train_level": ["adaptor"]}, "may hold adapter, lora, embeder, text, unet"),
        ({"train_level": []}, "may hold"),
        ({"reg_weight": -1}, "reg_weight"),
        ({"adapters": None}, "adapter_config"),
    ],
)
def test_wrong_settings_are_named(params, message):
    with pytest.raises(UserError, match=message):
        dream(**params).trainable_parameters()


def test_data_module_builds_pairs(photos, tmp_path):
    section = dict(
        target="ldm.data.personalized_dream.PersonalizedBase",
        params=dict(data_root=str(tmp_path), size=32, repeats=2),
    )
    reg = {**section, "params": {**section["params"], "reg": True}}
    module = DataModuleFromConfig(2, train=section, reg=reg, num_workers=0)
    module.setup("fit")
    module.encode(dream(), torch.device("cpu"))
    batch = next(iter(module.train_dataloader()))
    assert batch["instance"]["moments"].shape == (2, 8, 8, 8)
    assert batch["prior"]["caption"] == ["a photo of a dog"] * 2
