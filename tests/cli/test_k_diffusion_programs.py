"""scripts/likelihood.py and scripts/sample_clip_guided.py as a user runs them, on models whose answers are known."""

import csv
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import save_checkpoint
from ldm.data.base import ImageFolder
from ldm.errors import UserError
from ldm.util import instantiate_from_config, load_yaml
from tests.cli.sampling_model import main_of, write_model
from tests.networks import ROOT
from tests.programs import run
from tests.small_clip import write_clip
from tests.zoo import ZOO, build, small_config

LIKELIHOOD, CLIP_GUIDED = "scripts/likelihood.py", "scripts/sample_clip_guided.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: `pixels`, a model of 8x8 pixels that takes them for N(0, 0.7^2); `latents`; `text`; photos; a CLIP."""
    root = tmp_path_factory.mktemp("models")
    config = load_yaml(ROOT / "configs/karras/digits.yaml")
    config.model.params |= {"image_size": 8, "sigma_data": 0.7}
    config.model.params.unet_config.params |= {
        "feats_in": 16,
        "depths": [1],
        "channels": [32],
        "self_attn_depths": [False],
    }
    config.model.params.use_ema = False
    torch.manual_seed(0)
    model = instantiate_from_config(config.model)
    with torch.no_grad():
        for parameter in model.model.inner_model.proj_out.parameters():
            parameter.zero_()  # what is left of the denoiser is the best one for that Gaussian
    keep(root / "pixels", config, model)
    config = small_config(ZOO / "latent-diffusion/lsun_churches-ldm-kl-8.yaml")
    keep(root / "latents", config, build(config))
    (root / "text").mkdir()
    write_model(root / "text")
    (root / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{i}.png")
    (root / "photos" / "broken.png").write_text("no image")
    write_clip(root / "clip")
    return root


def keep(folder, config, model):
    folder.mkdir()
    save_checkpoint(model.state_dict(), folder / "model.ckpt")
    OmegaConf.save(config, folder / "config.yaml")


def likelihood(*words):
    main_of(LIKELIHOOD)([*map(str, words), "--device", "cpu"])


def clip_guided(*words):
    main_of(CLIP_GUIDED)([*map(str, words), "--device", "cpu"])


def test_bits_of_pixels_are_those_of_the_gaussian_that_the_model_is(models, tmp_path, capsys):
    table = tmp_path / "bits.csv"
    likelihood("-r", models / "pixels", "--images", models / "photos", "--csv", table, "--batch_size", 2)
    rows = list(csv.DictReader(table.open()))
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    variance, spread = 0.7**2 + 0.01**2, (2 / 255) ** 2 / 12
    for row, image in zip(rows, ImageFolder(models / "photos"), strict=True):
        squares = np.square(image[..., 0].astype(np.float64)).mean() + spread
        nats = 0.5 * math.log(2 * math.pi * variance) + squares / (2 * variance)  # a pixel, below zero
        assert float(row["bits_per_dim"]) == pytest.approx(nats / math.log(2) + math.log2(255 / 2), abs=0.02)
        assert float(row["nats_error"]) < 1e-3  # the network's part, which would have one, is 0
        assert float(row["nats"]) == pytest.approx(-64 * nats, abs=1.0)
    said = capsys.readouterr()
    mean = np.mean([float(row["bits_per_dim"]) for row in rows])
    assert f"3 images: {mean:.4f} bits/dim of bytes" in said.out and "broken.png" in said.err


def test_latents_and_captions_have_likelihoods_too(models, capsys):
    words = ("--images", models / "photos", "--n_images", 1, "--probes", 2, "--sigma_min", 4, "--sigma_max", 5)
    words += ("--tolerance", 0.5)  # random networks are rough
    likelihood("-r", models / "latents", *words)
    assert "1 images: " in (out := capsys.readouterr().out) and "of the latents' density" in out
    known = ("-r", models / "text" / "model.ckpt", "--config", models / "text" / "model.yaml", *words)
    means = []
    for caption in ("a red dog", "a blue house"):
        likelihood(*known, "--caption", caption)
        means.append(capsys.readouterr().out.splitlines()[-1].split()[2])
    assert means[0] != means[1] and all(math.isfinite(float(mean)) for mean in means)


@pytest.mark.parametrize(("name", "led", "counts"), [("pixels", 300, (3, 1)), ("latents", 10, (2,))])
def test_guidance_makes_pictures_more_like_the_text(name, led, counts, models, tmp_path, capsys):
    similarities = []
    for scale, count in [(0, counts[0]), *((led, count) for count in counts)]:
        prefix = tmp_path / f"{scale}-{count}" / "a"
        clip_guided("a red dog", "-r", models / name, "--clip_model", models / "clip", "-cgs", scale, "-n", count,
                    "--batch_size", 2, "--steps", 6, "--cutouts", 3, "--prefix", prefix)  # fmt: skip
        said = capsys.readouterr().out.splitlines()[-1]
        similarities.append(float(said.split("text ")[1].split()[0]))
        assert [path.name for path in sorted(prefix.parent.iterdir())] == [f"a_{i:05}.png" for i in range(count)]
    assert similarities[1] > similarities[0]
    pictures = [np.asarray(Image.open(tmp_path / f"{led}-{count}" / "a_00000.png"), int) for count in counts]
    assert np.abs(pictures[0] - pictures[-1]).max() <= 1  # whatever it is drawn together with


def test_any_sampler_is_led(models, tmp_path):
    for words in (["--sampler", "euler", "--schedule", "exponential"], ["--sampler", "dpmpp_2m_sde", "--eta", "0.5"]):
        clip_guided("a dog", "-r", models / "pixels", "--clip_model", models / "clip", "-n", 1, "--steps", 2,
                    "--prefix", tmp_path / "a", *words)  # fmt: skip


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (likelihood, ["--probes", "1"], "--probes 1: must be at least 2"),
        (likelihood, ["--images", "{}/none"], "--images: there is no folder"),
        (likelihood, ["--images", "{}/clip"], "holds no image files"),
        (likelihood, ["--sigma_min", "90"], "--sigma_min 90 and --sigma_max 80"),
        (likelihood, ["--sigma_max", "-1"], "--sigma_max -1: must be a number above 0"),
        (likelihood, ["--class", "3"], "--caption, --class: nothing leads this model"),
        (likelihood, ["-r", "{}/none"], "-r/--resume: there is no folder or file"),
        (clip_guided, ["--cutouts", "0"], "--cutouts 0: must be at least 1"),
        (clip_guided, ["--sampler", "ddim"], "sampler: 'ddim' is none of euler"),
        (clip_guided, ["--clip_model", "{}/photos"], "has no open_clip_config.json"),
        (clip_guided, ["--clip_model", "ViT-B-32", "--clip_weights", "{}/none.pt"], "--clip_weights: there is no file"),
        (clip_guided, ["-r", "{}/text/model.ckpt", "--config", "{}/text/model.yaml"], "led by something else"),
    ],
)
def test_wrong_input_is_one_clear_line(program, words, message, models):
    usual = {likelihood: ["--images", "{}/photos"], clip_guided: ["text", "--clip_model", "{}/clip"]}[program]
    given = [word.format(models) for word in [*usual, "-r", "{}/pixels", *words]]
    with pytest.raises(UserError, match=message):
        program(*given)


def test_a_missing_clip_is_told_before_the_model_is_read(models, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "model.ckpt").write_text("no weights")
    (folder / "config.yaml").write_text("no: model")
    with pytest.raises(UserError, match="--clip_model: there is no folder"):
        clip_guided("text", "-r", folder, "--clip_model", tmp_path / "none")


@pytest.mark.parametrize("script", [LIKELIHOOD, CLIP_GUIDED])
def test_the_programs_show_their_flags_and_fail_with_2(script):
    shown = run(script, "--help")
    assert shown.returncode == 0 and "--sigma_max" in shown.stdout or "--cutouts" in shown.stdout
    words = ["--images", "."] if script == LIKELIHOOD else ["text"]
    failed = run(script, *words, "-r", "nowhere")
    assert failed.returncode == 2 and failed.stderr.startswith("error: -r/--resume")
