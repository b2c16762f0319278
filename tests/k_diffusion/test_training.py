"""KarrasDiffusion: what it is trained on, its exact resume, its samples, and the command lines."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from benchmarks.kill import differences
from ldm.data.at_hand import Digits, PhotoCrops
from ldm.errors import UserError
from ldm.k_diffusion.pixels import PixelSampler
from ldm.k_diffusion.quality import DistanceLogger
from ldm.k_diffusion.training import KarrasDiffusion
from ldm.models.diffusion.trainer import noises
from ldm.modules.noise import ImmiscibleNoise
from ldm.modules.randomness import SampleRandom
from ldm.samplers import SAMPLERS
from ldm.util import instantiate_from_config, load_yaml
from tests.cli.sampling_model import main_of
from tests.networks import ROOT
from tests.training_runs import run

CONFIGS = sorted((ROOT / "configs" / "karras").glob("*.yaml"))
UNET = {
    "target": "ldm.k_diffusion.models.image_v1.ImageDenoiserModelV1",
    "params": {"c_in": 1, "feats_in": 16, "depths": [1, 1], "channels": [16, 16], "self_attn_depths": [False, True]},
}
TINY = [
    "model.params.unet_config.params.channels=[16,16]", "model.params.unet_config.params.depths=[1,1]",
    "model.params.unet_config.params.feats_in=16", "model.params.image_size=8",
    "data.params.train.params.size=8", "data.params.batch_size=4", "lightning.callbacks=null",
]  # fmt: skip


def model(**settings):
    torch.manual_seed(0)
    return KarrasDiffusion(UNET, **dict(image_size=8, channels=1) | settings)


def batch(count=4, channels=1):
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.rand(count, 8, 8, channels, generator=generator) * 2 - 1}


def random(count=4, first=0, stride=1):
    return SampleRandom(7, 0, first, count, "cpu", stride)


# ---- a step -------------------------------------------------------------------------------------------------


def test_a_step_is_the_denoisers_loss_at_the_densitys_levels():
    module = model().train()
    x = batch()["image"].permute(0, 3, 1, 2)
    draw = random()
    sigma, noise = module.density(draw.rand()), draw.randn_like(x)
    loss, logs = module.shared_step(batch(), random())
    torch.testing.assert_close(loss, module.model.loss(x, noise, sigma).mean())
    assert torch.equal(logs["train/loss"], loss.detach())


def test_samples_of_a_batch_do_not_depend_on_the_other_ones():
    module = model(augment_prob=0.5).train()
    seen = []
    module.model.loss = lambda x, noise, sigma, seen_noise, aug_cond: seen.append((x, noise, sigma, aug_cond)) or sigma
    whole = batch()
    module.shared_step(whole, random())
    module.shared_step({"image": whole["image"][1::2]}, random(2, first=1, stride=2))
    for of_all, of_part in zip(*seen, strict=True):
        torch.testing.assert_close(of_all[1::2], of_part)


def test_stratified_levels_fill_all_parts():
    module = model(stratified=True)
    shares = module.draw_sigma(random(8)).log().sub(-1.2).div(1.2).mul(0.5**0.5).erf().add(1).div(2)
    assert sorted((shares * 8).long().tolist()) == list(range(8))


def test_noise_is_drawn_as_noise_config_says():
    section = {"target": "ldm.modules.noise.ImmiscibleNoise", "params": {"method": "knn", "k": 8}}
    module = model(noise_config=section).train()
    assert isinstance(module.draw, ImmiscibleNoise)
    seen = []
    module.model.loss = lambda x, noise, sigma, seen_noise: seen.append((x, noise)) or sigma
    for first in range(0, 200, 20):
        module.shared_step(batch(20), random(20, first))
    x, noise = (torch.cat(parts) for parts in zip(*seen, strict=True))
    correlation = torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1]
    assert float(correlation) > 0.05  # plain noise has none, within 0.01


def test_perturbed_noise_is_seen_in_training_alone():
    section = {"target": "ldm.modules.noise.GaussianNoise", "params": {"input_perturbation": 0.5}}
    module = model(noise_config=section)
    seen = []
    module.model.loss = lambda x, noise, sigma, seen_noise: seen.append(bool((noise == seen_noise).all())) or sigma
    module.train().shared_step(batch(), random())
    module.eval().shared_step(batch(), random())
    assert seen == [False, True]


def test_a_variance_output_is_trained_by_its_own_loss():
    section = {"target": UNET["target"], "params": UNET["params"] | {"has_variance": True}}
    torch.manual_seed(0)
    module = KarrasDiffusion(section, image_size=8, channels=1)
    loss, _ = module.shared_step(batch(), random())
    loss.backward()
    assert all(p.grad is not None for p in module.model.parameters())


def test_coloured_images_become_grey_where_the_model_is():
    images = model().get_input(batch(2, 3), "image")
    torch.testing.assert_close(images, batch(2, 3)["image"].mean(3)[:, None])
    with pytest.raises(UserError, match="images have 1 channels and 8x8 pixels, but the model is for 1 and 16x16"):
        model(image_size=16).get_input(batch(), "image")


@pytest.mark.parametrize("settings, said", [
    (dict(sigma_min=1.0, sigma_max=0.5), "needs 0 < sigma_min < sigma_max"),
    (dict(optimizer_config={"type": "lion"}), "type is 'lion'; it may be adamw or sgd"),
    (dict(image_size=9), "image_size is 9; for this unet_config it must be 4, 6, ..."),
    (dict(ckpt_path="a", grow_from="b"), "exclude each other"),
    (dict(ema_config={"gamma": 1}), "params of ldm.modules.ema.InverseWarmUp: .*gamma"),
    (dict(grow_from="nowhere.ckpt"), "there is no file 'nowhere.ckpt'"),
])  # fmt: skip
def test_wrong_settings_are_said(settings, said):
    with pytest.raises(UserError, match=said):
        model(**settings)


def test_the_optimiser_takes_what_the_yaml_says():
    module = model(optimizer_config={"type": "sgd", "momentum": 0.9, "weight_decay": 0.1})
    optimizer = module.make_optimizer(fused=True)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    with pytest.raises(UserError, match="optimizer_config: .*beta"):
        model(optimizer_config={"beta": 1}).make_optimizer(fused=True)


# ---- samples ------------------------------------------------------------------------------------------------


class Exact(torch.nn.Module):
    """The denoiser of data that is normal with mean 0.3 and standard deviation 0.5."""

    def forward(self, x, sigma):
        sigma = sigma.view(-1, 1, 1, 1)
        return (0.25 * x + sigma**2 * 0.3) / (0.25 + sigma**2)


@pytest.mark.parametrize("sampler", [name for name, choice in SAMPLERS.items() if "sampler" in choice.settings])
def test_every_sampler_draws_the_data_whatever_the_batch(sampler):
    module = model(sigma_min=0.02, sigma_max=20.0)
    module.model = Exact()
    how = PixelSampler(steps=20, sampler=sampler)
    images = module.sample(noises(0, 12), how)
    assert images.shape == (12, 1, 8, 8)
    assert abs(float(images.mean()) - 0.3) < 0.05 and abs(float(images.std()) - 0.5) < 0.1
    if sampler != "dpm_adaptive":  # whose steps are chosen for the whole batch
        torch.testing.assert_close(module.sample(noises(7, 2), how), images[7:9], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings, said", [
    (dict(sampler="ddim"), "sampler: 'ddim' is none of euler"),
    (dict(schedule="uniform"), "schedule: 'uniform' is none of karras"),
    (dict(steps=0), "steps"),
    (dict(eta=0.5), "eta"),
])  # fmt: skip
def test_wrong_ways_to_draw_are_said(settings, said):
    with pytest.raises(UserError, match=said):
        PixelSampler(**settings)


# ---- data and yaml ------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, truth = Digits(8), load_digits()
    assert len(digits) == 1797 and digits[5]["class_label"] == truth.target[5]
    np.testing.assert_allclose(digits[5]["image"][..., 0], truth.images[5] / 8 - 1, atol=0.005)


def test_a_part_of_a_photograph_is_the_same_at_any_size():
    small, large = PhotoCrops(16, 10)[3]["image"], PhotoCrops(64, 10)[3]["image"]
    assert small.shape == (16, 16, 3) and -1 <= small.min() < small.max() <= 1
    halves = large.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(halves - small).mean() < 0.05
    with pytest.raises(UserError, match="smallest is 2"):
        PhotoCrops(smallest=2)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_builds(path):
    from ldm.loading import build_model

    config = load_yaml(path)
    module = build_model(config)
    assert module.density is not None and config.model.params.sigma_data > 0
    for section in config.lightning.callbacks.values():
        instantiate_from_config(section)


# ---- runs ---------------------------------------------------------------------------------------------------


def words(*more):
    return [
        "--base",
        str(ROOT / "configs/karras/digits.yaml"),
        "-n",
        "run",
        "lightning.trainer.logger=false",
        *TINY,
        *more,
    ]


def last(logs):
    (folder,) = logs.iterdir()
    return folder, torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_that_was_taken_up_ends_as_one_that_never_stopped(tmp_path):
    more = ["model.params.augment_prob=0.3", "model.params.unet_config.params.dropout_rate=0.1"]
    run(tmp_path / "a", *words(*more), "--max_steps", 6)
    run(tmp_path / "b", *words(*more), "--max_steps", 3)
    folder, _ = last(tmp_path / "b")
    run(tmp_path / "b", "--resume", folder, "--max_steps", 6)
    a, b = last(tmp_path / "a")[1], last(tmp_path / "b")[1]
    assert a["global_step"] == b["global_step"] == 6
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert not list(differences(a[key], b[key], key))


def test_a_run_measures_itself_and_draws(tmp_path):
    sampling = "{steps: 2}"
    callbacks = [
        "lightning.callbacks.distances.target=ldm.k_diffusion.quality.DistanceLogger",
        "lightning.callbacks.distances.params={every_n_train_steps: 2, samples: 6, references: 8, features: tiny, "
        f"sampling: {sampling}}}",
        "lightning.callbacks.noise.target=ldm.k_diffusion.gradient_noise.GradientNoiseLogger",
        "lightning.callbacks.pictures.target=main.ImageLogger",
        "lightning.callbacks.pictures.params={batch_frequency: 3, max_images: 2, log_images_kwargs: "
        f"{{sampling: {sampling}}}}}",
    ]
    more = [word for word in words(*callbacks) if word != "lightning.callbacks=null"]
    config = tmp_path / "quiet.yaml"
    config.write_text("lightning: {callbacks: null}\nmodel: {params: {stratified: false}}\n")
    more[2:2] = [str(config)]
    trainer = run(tmp_path / "logs", *more, "--max_steps", 3, "--accumulate_grad_batches", 2)
    (folder,) = (tmp_path / "logs").iterdir()
    with open(folder / "distances.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2"]
    assert all(float(row["FID (tiny features)"]) > 0 for row in rows)
    assert list((folder / "images" / "train").glob("samples_gs-000003_*.png"))
    assert np.isfinite(float(trainer.callback_metrics["gradient_noise_scale"]))


@pytest.mark.parametrize("settings, said", [
    ({"samples": 0}, "samples is 0; it must be a whole number above 0"),
    ({"features": "clip"}, "features is 'clip'; it may be auto, inception, tiny"),
    ({"sampling": {"sampler": "ddim"}}, "sampler: 'ddim' is none of"),
])  # fmt: skip
def test_wrong_ways_to_measure_are_said(settings, said):
    with pytest.raises(UserError, match=said):
        DistanceLogger(**settings)


def test_gradient_noise_needs_several_batches_a_step(tmp_path):
    noise = "lightning.callbacks={noise: {target: ldm.k_diffusion.gradient_noise.GradientNoiseLogger}}"
    with pytest.raises(UserError, match="accumulate_grad_batches to 2 or more"):
        run(tmp_path / "a", *words(noise), "--max_steps", 1)
    with pytest.raises(UserError, match="stratified"):
        run(tmp_path / "b", *words(noise), "--max_steps", 1, "--accumulate_grad_batches", 2)


def test_a_model_of_k_diffusion_is_trained_on_grown_and_drawn_from(tmp_path, capsys):
    """The command lines, one after the other: convert, train, grow, draw."""
    upstream = {
        "model": {
            "type": "image_v1", "input_channels": 1, "input_size": [8, 8], "mapping_out": 16, "depths": [1, 1],
            "channels": [16, 16], "self_attn_depths": [False, True], "sigma_data": 0.7, "sigma_min": 0.01,
            "sigma_max": 80, "sigma_sample_density": {"type": "cosine-interpolated"},
        },
    }  # fmt: skip
    network = model(augment_prob=0.0).model.inner_model
    (tmp_path / "up.json").write_text(json.dumps(upstream))
    content = {"model": network.state_dict(), "model_ema": network.state_dict(), "ema_sched": {"last_epoch": 5}}
    torch.save(content, tmp_path / "up.pth")
    convert, sample = main_of("scripts/convert_karras.py"), main_of("scripts/sample_diffusion.py")
    convert([str(tmp_path / "up.pth"), str(tmp_path / "ours.ckpt")])
    more = [
        "lightning.trainer.logger=false",
        "data.params.train.target=ldm.data.at_hand.Digits",
        "data.params.num_workers=0",
    ]
    data = ["data.params.wrap=true", "data.params.batch_size=4"]
    base = OmegaConf.load(tmp_path / "ours.yaml")
    base.data.params.train.params = {"size": 8}
    OmegaConf.save(base, tmp_path / "ours.yaml")
    run(tmp_path / "logs", "--base", tmp_path / "ours.yaml", *more, *data, "--max_steps", 2)
    folder, content = last(tmp_path / "logs")
    assert int(content["state_dict"]["model_ema.num_updates"]) == 7
    origin = folder / "checkpoints" / "last.ckpt"
    grown = [f"model.params.grow_from={origin}", "model.params.ckpt_path=null",
             "model.params.image_size=16", "data.params.train.params.size=16",
             "model.params.unet_config.params.channels=[16,16,16]", "model.params.unet_config.params.depths=[1,1,1]",
             "model.params.unet_config.params.self_attn_depths=[false,false,true]"]  # fmt: skip
    run(tmp_path / "grown", "--base", tmp_path / "ours.yaml", *more, *data, *grown, "--max_steps", 1)
    origin.unlink()  # what the grown one holds need not be there any more
    convert([str(last(tmp_path / "grown")[0] / "checkpoints" / "last.ckpt"), str(tmp_path / "slim.safetensors")])
    capsys.readouterr()
    sample(["-r", str(tmp_path / "slim.safetensors"), "-n", "3", "-c", "4", "--sampler", "heun", "-l", str(tmp_path)])
    pictures = sorted(Path(tmp_path).glob("*/samples/slim/*/img/*.png"))
    assert len(pictures) == 3 and Image.open(pictures[0]).size == (16, 16)
    with pytest.raises(UserError, match="sampler: 'ddim' is none of"):
        sample(["-r", str(tmp_path / "slim.safetensors"), "-n", "3", "--sampler", "ddim"])
    with pytest.raises(UserError, match="--vanilla_sample"):
        sample(["-r", str(tmp_path / "slim.safetensors"), "-n", "3", "-v"])
