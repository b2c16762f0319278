"""k-diffusion's own files: JSON configs and checkpoints, read, written anew and used."""

import json
import math
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.errors import UserError
from ldm.k_diffusion import densities
from ldm.k_diffusion.augmentation import AugmentWrapper
from ldm.k_diffusion.config import complete, read_json, to_yaml
from ldm.k_diffusion.convert import convert
from ldm.k_diffusion.models.image_v1 import ImageDenoiserModelV1
from ldm.loading import load_model
from ldm.run import read_run
from ldm.util import instantiate_from_config, load_yaml
from ldm.weight_files import read_state_dict
from tests.goldens.fill import data, fill

MODEL = {
    "type": "image_v1", "input_channels": 3, "input_size": [8, 8], "mapping_out": 16, "depths": [1, 1],
    "channels": [32, 64], "self_attn_depths": [False, True], "sigma_data": 0.5, "sigma_min": 1e-2, "sigma_max": 80,
    "sigma_sample_density": {"type": "lognormal", "mean": -1.2, "std": 1.2},
}  # fmt: skip
SIGMA = torch.tensor([0.3, 20.0])


def network(**settings):
    """The network that MODEL describes, filled, with augmentation's wrapper."""
    built = ImageDenoiserModelV1(3, 16, [1, 1], [32, 64], [False, True], mapping_cond_dim=9)
    return AugmentWrapper(fill(built, **settings)).eval()


@pytest.fixture
def trained(tmp_path):
    """A training checkpoint as k-diffusion writes it, with its config beside it, and the two networks in it."""
    plain, average = network(), network(prefix="average")
    average.load_state_dict(average.state_dict() | dict(plain.named_buffers()))  # which are never trained
    optimizer = torch.optim.AdamW(plain.parameters())
    content = {
        "model": plain.state_dict(), "model_ema": average.state_dict(), "opt": optimizer.state_dict(),
        "sched": {"inv_gamma": 20000.0, "base_lrs": [1e-4], "last_epoch": 7, "_step_count": 8},
        "ema_sched": {"inv_gamma": 1.0, "power": 0.6667, "max_value": 0.9999, "last_epoch": 123},
        "epoch": 3, "step": 123, "gns_stats": {"beta": 0.9998, "ema_sq_norm": 1.0},
    }  # fmt: skip
    torch.save(content, tmp_path / "model_00000123.pth")
    (tmp_path / "model_00000123.json").write_text(json.dumps({"model": MODEL}))
    return tmp_path / "model_00000123.pth", plain, average


def config(**model):
    return complete({"model": MODEL | model}, "test.json")


def test_a_config_is_completed_and_its_parts_are_found(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{\n\t"model": ' + json.dumps(MODEL) + ',\n\t"lr_sched": {"type": "inverse", "inv_gamma": 20000.0, '
                    '"power": 1.0, "warmup": 0.99},\n"dataset": {"type": "mnist", "location": "data"}}')  # fmt: skip
    whole = to_yaml(read_json(path))
    params = whole["model"]["params"]
    assert whole["model"]["base_learning_rate"] == 1e-4 and whole["run"] == {"scale_lr": False}
    assert params["optimizer_config"] == {"type": "adamw", "betas": [0.95, 0.999], "eps": 1e-6, "weight_decay": 1e-3}
    assert params["ema_config"] == {"power": 0.6667, "max_value": 0.9999} and params["augment_prob"] == 0.0
    assert whole["data"]["params"]["train"]["target"] == "ldm.data.tables.TorchvisionImages"
    model = instantiate_from_config(whole["model"])
    model.learning_rate = 1e-4
    assert model.density == densities.LogNormal(-1.2, 1.2)
    assert model.model.inner_model.inner_model.mapping_cond.weight.shape == (16, 9)
    (optimizer,), (scheduler,) = model.configure_optimizers()
    rates = []
    for _ in range(3):
        rates.append(scheduler["scheduler"].get_last_lr()[0])
        optimizer.step()
        scheduler["scheduler"].step()
    expected = [1e-4 * (1 - 0.99 ** (n + 1)) / (1 + n / 20000) for n in range(3)]  # InverseLR's
    assert rates == pytest.approx(expected)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 0.0]
    assert all(group["betas"] == (0.95, 0.999) and group["eps"] == 1e-6 for group in optimizer.param_groups)


@pytest.mark.parametrize("section, expected", [
    ({"type": "loglogistic"}, densities.LogLogistic(math.log(0.5), 0.5)),
    ({"type": "loguniform"}, densities.LogUniform(1e-2, 80)),
    ({"type": "v-diffusion", "max_value": 50.0}, densities.VDiffusion(0.5, 1e-3, 50.0)),
    ({"type": "cosine"}, densities.VDiffusion(0.5)),
    ({"type": "split-lognormal", "mean": 0.0, "std_1": 1.0, "std_2": 2.0}, densities.SplitLogNormal(0.0, 1.0, 2.0)),
    ({"type": "cosine-interpolated"}, densities.CosineInterpolated(8, 8, 32, 0.5, 1e-3, 1e3)),
])  # fmt: skip
def test_densities_are_found(section, expected):
    params = to_yaml(config(sigma_sample_density=section))["model"]["params"]
    assert instantiate_from_config(params["sigma_density"]) == expected


def test_the_simple_loss_is_a_weighting():
    assert to_yaml(config(loss_config="simple"))["model"]["params"]["weighting"] == "snr"


@pytest.mark.parametrize("change, said", [
    ({"type": "image_transformer_v2"}, "model type 'image_transformer_v2' is not supported; image_v1 is"),
    ({"input_size": [8, 16]}, "images are square"),
    ({"loss_scales": 3}, "loss_scales is 3"),
    ({"sigma_sample_density": {"type": "normal"}}, "sigma_sample_density.type is 'normal'"),
])  # fmt: skip
def test_what_is_not_supported_is_said(change, said):
    with pytest.raises(UserError, match=said):
        to_yaml(config(**change))


def test_files_that_are_no_configs_are_refused(tmp_path):
    for text, said in (
        ("{", "is no JSON"),
        ("{}", 'no section "model"'),
        ('{"model": {"type": "image_v1"}}', "missing"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=said):
            read_json(tmp_path / "a.json")


def test_a_training_checkpoint_becomes_one_to_sample_from(trained, tmp_path):
    source, _, average = trained
    lines = list(convert(source, tmp_path / "slim.safetensors"))
    assert len(lines) == 2 and not any("model_ema" in key for key in load_file(tmp_path / "slim.safetensors"))
    model = load_model(tmp_path / "slim.yaml", tmp_path / "slim.safetensors", "cpu")
    x = data("x", (2, 3, 8, 8))
    c_in = (SIGMA**2 + 0.25).rsqrt().view(-1, 1, 1, 1)
    s = SIGMA.view(-1, 1, 1, 1)
    expected = x * 0.25 * c_in**2 + s * 0.5 * c_in * average(c_in * x, SIGMA)
    torch.testing.assert_close(model.model(x, SIGMA), expected)


def test_a_training_checkpoint_becomes_one_to_train_on_from(trained, tmp_path):
    source, plain, average = trained
    list(convert(source, tmp_path / "model.ckpt"))
    list(convert(source, tmp_path / "model.safetensors", dtype=torch.float16))  # whose yaml has the same name
    model = instantiate_from_config(load_yaml(tmp_path / "model.yaml").model)
    own = model.model.inner_model.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(own[key], value), key
    assert int(model.model_ema.num_updates) == 123
    with model.ema_scope():
        for key, value in average.state_dict().items():
            assert torch.equal(own[key], value), key


def test_an_inference_checkpoint_brings_its_config(trained, tmp_path):
    _, _, average = trained
    path = tmp_path / "inference.safetensors"
    save_file(average.state_dict(), path, metadata={"config": json.dumps({"model": MODEL})})
    list(convert(path, tmp_path / "ours.safetensors", dtype=torch.float16))
    state = load_file(tmp_path / "ours.safetensors")
    assert state["model.inner_model.inner_model.proj_in.weight"].dtype == torch.float16
    assert load_yaml(tmp_path / "ours.yaml").model.params.image_size == 8


def test_a_run_of_ours_is_stripped(trained, tmp_path):
    source, _, average = trained
    list(convert(source, tmp_path / "run" / "checkpoints" / "last.ckpt"))
    (tmp_path / "run" / "configs").mkdir()
    (tmp_path / "run" / "checkpoints" / "last.yaml").rename(tmp_path / "run" / "configs" / "project.yaml")
    list(convert(tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "model.safetensors"))
    state = load_file(tmp_path / "model.safetensors")
    assert {key.removeprefix("model.inner_model.") for key in state} == set(average.state_dict())
    weight = "inner_model.proj_in.weight"
    assert torch.equal(state[f"model.inner_model.{weight}"], average.state_dict()[weight])


def test_images_that_only_their_author_can_read_become_a_folder_to_be_named(trained, tmp_path):
    """As those of the cars in upstream's README, whose data set is a class of its author's."""
    source = trained[0]
    source.with_suffix(".json").write_text(json.dumps({"model": MODEL, "dataset": {"type": "cars"}}))
    assert len(list(convert(source, tmp_path / "slim.safetensors"))) == 2
    for path, target in ((source.with_suffix(".json"), "run.yaml"), (source, "model.ckpt")):
        *_, said = convert(path, tmp_path / target)
        assert said.startswith("dataset.type 'cars' is none of imagefolder,") and "data_root" in said
        data = load_yaml((tmp_path / target).with_suffix(".yaml")).data.params.train
        assert data.target.endswith("CaptionedFolder") and data.params.size == 8


def test_what_cannot_be_converted_is_said(trained, tmp_path):
    source = trained[0]
    cases = [
        (source, "a.bin", "must end in .yaml, .ckpt, .safetensors"),
        (source.with_suffix(".json"), "a.ckpt", "holds no weights"),
    ]
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pth")
    cases.append((tmp_path / "other.pth", "a.ckpt", "no checkpoint of k-diffusion"))
    for path, target, said in cases:
        with pytest.raises(UserError, match=said):
            list(convert(path, tmp_path / target))
    source.with_suffix(".json").write_text(json.dumps({"model": MODEL | {"channels": [32, 96]}}))
    with pytest.raises(UserError, match="does not fit its yaml"):
        list(convert(source, tmp_path / "a.ckpt"))
    source.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="give its .json with --config"):
        list(convert(source, tmp_path / "a.ckpt"))


def test_files_that_were_not_converted_yet_say_how(trained, tmp_path):
    source = trained[0]
    with pytest.raises(UserError, match="is a training checkpoint of k-diffusion; .*convert_karras.py"):
        read_state_dict(source)
    options = Namespace(base=[str(source.with_suffix(".json"))], overrides=[])
    with pytest.raises(UserError, match=r"convert_karras.py .*model_00000123.json .*model_00000123.yaml"):
        read_run(options)
