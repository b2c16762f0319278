"""Names, shapes and config files of the exchange with diffusers, part by part, at full size and without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import empty_weights
from ldm.errors import UserError
from ldm.exchange import folder, layout, schedule, text, unet, vae
from ldm.exchange.convert import Conversion
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.util import instantiate_from_config, load_yaml
from ldm.weight_files import write_tensors
from tests.networks import GOLDENS, ROOT
from tests.pipelines import libraries, pipeline

SD_V1 = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
SD_V2_UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "use_linear_projection": True,
    "upcast_attention": True,
}


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def theirs(class_name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of diffusers' network of that config."""
    diffusers, _ = libraries()
    with torch.device("meta"):
        return shapes(getattr(diffusers, class_name).from_config(config).state_dict())


def test_sd_v1_at_full_size() -> None:
    goldens = json.loads((GOLDENS / "keys.json").read_text(encoding="utf-8"))
    params = OmegaConf.to_container(load_yaml(SD_V1))["model"]["params"]
    configs = layout.configs_to_diffusers(load_yaml(SD_V1), 0.18215)

    names = unet.names(params["unet_config"]["params"])
    expected = theirs("UNet2DConditionModel", configs["unet"])
    assert {names.theirs(key): tuple(shape) for key, shape in goldens["sd_v1_unet"].items()} == expected
    assert {names.ours(key) for key in expected} == goldens["sd_v1_unet"].keys()

    names = vae.names(params["first_stage_config"]["params"]["ddconfig"])
    expected = theirs("AutoencoderKL", configs["vae"])
    tensors = {key: torch.empty(shape, device="meta") for key, shape in goldens["sd_v1_vae"].items()}
    converted = {names.theirs(k): vae.weight_to_diffusers(names.theirs(k), v) for k, v in tensors.items()}
    assert shapes(converted) == expected
    back = {names.ours(k): vae.weight_from_diffusers(k, v) for k, v in converted.items()}
    assert shapes(back) == shapes(tensors)

    assert configs["unet"]["attention_head_dim"] == 8
    assert configs["text_encoder"]["hidden_size"] == 768
    assert configs["text_encoder"]["num_hidden_layers"] == 12
    assert configs["scheduler"]["_class_name"] == "PNDMScheduler"


def test_sd_v2_at_full_size() -> None:
    params = unet.from_diffusers(SD_V2_UNET)
    assert params["num_head_channels"] == 64 and params["use_linear_in_transformer"]
    with empty_weights():
        own = instantiate_from_config(
            {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}
        )
    names = unet.names(params)
    expected = theirs("UNet2DConditionModel", SD_V2_UNET)
    assert {names.theirs(key): tuple(value.shape) for key, value in own.state_dict().items()} == expected
    assert unet.to_diffusers(params, 96)["attention_head_dim"] == SD_V2_UNET["attention_head_dim"]


@pytest.mark.parametrize(
    "section, layers",
    [
        ({"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}, 12),
        ({"target": text.OPEN_CLIP, "params": {"freeze": True, "layer": "penultimate"}}, 23),
    ],
)
def test_text_encoders_of_full_size(section: dict[str, Any], layers: int) -> None:
    config = text.to_diffusers(section)
    assert config["num_hidden_layers"] == layers
    assert text.from_diffusers(config) == section


def test_attention_in_the_autoencoder_and_other_groups() -> None:
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 16,
        "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0, "num_groups": 8,
    }  # fmt: skip
    params = {"embed_dim": 4, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    config = vae.to_diffusers(params, 0.5)
    with empty_weights():
        own = instantiate_from_config({"target": "ldm.models.autoencoder.AutoencoderKL", "params": params})
    names = vae.names(ddconfig)
    found = {names.theirs(k): vae.weight_to_diffusers(names.theirs(k), v) for k, v in own.state_dict().items()}
    assert shapes(found) == theirs("AutoencoderKL", config)
    assert vae.from_diffusers(config) == params


@pytest.mark.parametrize(
    "params",
    [
        {"linear_start": 0.00085, "linear_end": 0.012},
        {"linear_start": 0.00085, "linear_end": 0.012, "parameterization": "v"},
        {"beta_schedule": "sqrt_linear", "timesteps": 500, "parameterization": "x0"},
        {"beta_schedule": "cosine"},
        {"beta_schedule": "cosine", "cosine_s": 0.02},
        {"beta_schedule": "sqrt", "linear_start": 0.0001, "linear_end": 0.0004},
    ],
)
def test_noise_schedules(params: dict[str, Any]) -> None:
    diffusers, _ = libraries()
    config = schedule.to_diffusers(params)
    their = getattr(diffusers, config["_class_name"]).from_config(config)
    for settings in (params, schedule.from_diffusers(dict(their.config))):
        own = NoiseSchedule()
        own.parameterization, own.v_posterior = settings.get("parameterization", "eps"), 0.0
        names = ("given_betas", "beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s")
        own.register_schedule(**{name: settings[name] for name in names if name in settings})
        torch.testing.assert_close(own.alphas_cumprod, their.alphas_cumprod, rtol=2e-4, atol=1e-6)
        assert own.parameterization == params.get("parameterization", "eps")


BAD_PARTS = {
    "SDXL": ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
    "a latent consistency model": ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
    "depth": ("unet/config.json", {"in_channels": 5}, "in_channels is 5"),
    "other blocks": ("unet/config.json", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "the blocks"),
    "no multiples": ("unet/config.json", {"block_out_channels": [32, 48]}, "no multiples"),
    "SD3's autoencoder": ("vae/config.json", {"shift_factor": 0.06}, "shift_factor"),
    "a flow": ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow-matching"),
    "another activation": ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act"),
    "another pipeline": ("model_index.json", {"unet": None}, "no Stable Diffusion"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    pipeline("v1", root / "parts").save_pretrained(root / "v1")
    return root / "v1"


def copy_configs(source: Path, target: Path) -> Path:
    """The pipeline with its weights linked and its config files free to change."""
    for file in source.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".json":
                place.write_bytes(file.read_bytes())
            else:
                place.symlink_to(file)
    return target


@pytest.mark.parametrize("name", BAD_PARTS)
def test_models_of_another_kind_are_refused_in_a_line(name: str, saved: Path, tmp_path: Path) -> None:
    file, change, word = BAD_PARTS[name]
    copy = copy_configs(saved, tmp_path / "copy")
    content = json.loads((copy / file).read_text(encoding="utf-8")) | change
    (copy / file).write_text(json.dumps({k: v for k, v in content.items() if k != "unet" or v}), encoding="utf-8")
    with pytest.raises(UserError, match=word) as caught:
        folder.check_folder(copy)
    assert "\n" not in str(caught.value)


def test_damaged_folders(saved: Path, tmp_path: Path) -> None:
    copy = copy_configs(saved, tmp_path / "copy")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(UserError, match="no weights .* in '.*vae'"):
        folder.check_folder(copy)
    index = copy / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}), encoding="utf-8")
    with pytest.raises(UserError, match="beside it"):
        folder.check_folder(copy)
    (copy / "unet" / "config.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match="unet/config.json.* cannot be read"):
        folder.check_folder(copy)
    (copy / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="there is no file '.*unet/config.json'"):
        folder.check_folder(copy)


def test_old_names_pieces_and_pickled_weights_are_read(saved: Path, tmp_path: Path) -> None:
    copy = copy_configs(saved, tmp_path / "copy")
    expected, config = folder.read_folder(saved)
    state = folder.read_part(saved / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
    part = copy / "vae"
    (part / "diffusion_pytorch_model.safetensors").unlink()
    write_tensors(state, part / "diffusion_pytorch_model.bin", "bin")
    state = folder.read_part(saved / "text_encoder")
    part = copy / "text_encoder"
    (part / "model.safetensors").unlink()
    halves = {"one.safetensors": list(state)[::2], "two.safetensors": list(state)[1::2]}
    for name, keys in halves.items():
        write_tensors({key: state[key] for key in keys}, part / name, "safetensors")
    places = {key: name for name, keys in halves.items() for key in keys}
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    read, again = folder.read_folder(copy)
    assert again == config
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_a_folder_is_rewritten_with_all_its_parts(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "half"
    assert list(Conversion(dtype=torch.float16, as_bin=True)(saved, target)) == []
    expected = {file.relative_to(saved).with_suffix("") for file in saved.rglob("*") if file.suffix != ".safetensors"}
    assert expected <= {file.relative_to(target).with_suffix("") for file in target.rglob("*")}
    assert (target / "text_encoder" / "pytorch_model.bin").is_file()
    state, before = folder.read_part(target / "unet"), folder.read_part(saved / "unet")
    assert all(torch.equal(state[key], before[key].half()) for key in before)
    assert folder.verify_sums(target)
    with open(target / "unet" / "diffusion_pytorch_model.bin", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    with pytest.raises(UserError, match="is not the file that SHA256SUMS was made for"):
        list(Conversion()(target, tmp_path / "model.ckpt"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there already and is no pipeline"), folder.atomic_folder(mine):
        pass
    for word in ("first", "second"):
        with folder.atomic_folder(tmp_path / "pipe") as new:
            folder.write_json({"is": word}, new / "model_index.json")
    with pytest.raises(KeyboardInterrupt), folder.atomic_folder(tmp_path / "pipe") as new:
        folder.write_json({"is": "third"}, new / "model_index.json")
        raise KeyboardInterrupt
    assert folder.read_json(tmp_path / "pipe" / "model_index.json") == {"is": "second"}
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "pipe"}
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def changed(path: str, value: Any) -> DictConfig:
    config = load_yaml(SD_V1)
    OmegaConf.update(config, path, value, force_add=True)
    return config


@pytest.mark.parametrize(
    "path, value, word",
    [
        ("model.params.conditioning_key", "concat", "conditioning_key: concat"),
        ("model.params.unet_config.params.use_spatial_transformer", False, "use_spatial_transformer"),
        ("model.params.unet_config.params.channel_mult", [2, 4], "channel_mult must begin with 1"),
        ("model.params.first_stage_config.target", "ldm.models.autoencoder.VQModelInterface", "AutoencoderKL"),
        ("model.params.first_stage_config.params.embed_dim", 3, "embed_dim"),
        ("model.params.cond_stage_config.target", "ldm.modules.encoders.modules.ClassEmbedder", "ClassEmbedder"),
    ],
)
def test_models_without_a_counterpart_are_refused(path: str, value: Any, word: str) -> None:
    with pytest.raises(UserError, match=word):
        layout.configs_to_diffusers(changed(path, value), 0.2)
