import json
import shutil

import pytest
import torch

from ldm.errors import UserError
from ldm.modules import adapter_files, adapters
from tests.networks import GOLDENS, adapted_unet, run, spatial_unet

LISTING = json.loads((GOLDENS / "adapters.json").read_text())["directory"]
CONFIG = {"transformer_adp_config": [{"din": "attn2o", "dout": "ffni", "mid_dim": 6, "scale": 0.7}]}
RESIDUAL = {"resblock_adp_config": {"din": "resi", "dout": "reso", "mid_dim": 3, "scale": 0.7}}
CONFIG_OF = {"attn2o-ffni": CONFIG, "resi-reso": RESIDUAL}


def model(config=CONFIG):
    """The small U-Net with trained adapters."""
    return adapted_unet(config)


def fresh(config=CONFIG):
    """The same base with new adapters."""
    unet = spatial_unet()
    adapters.inject(unet, config)
    return unet


def change_config(**changes):
    [entry] = CONFIG["transformer_adp_config"]
    return {"transformer_adp_config": [entry | changes]}


@pytest.fixture
def saved(tmp_path):
    model().save_adapter_to_dir(tmp_path / "500-adapters", class_word="dog", step=500)
    return tmp_path / "500-adapters"


def shapes_in(directory):
    return {
        file.name: {k: list(v.shape) for k, v in torch.load(file, weights_only=True).items()}
        for file in directory.glob("*.pt")
    }


@pytest.mark.parametrize("name", LISTING)
def test_files_are_the_originals(tmp_path, name):
    model(CONFIG_OF[name]).save_adapter_to_dir(tmp_path / "a")
    assert shapes_in(tmp_path / "a") == LISTING[name]
    assert {f.name for f in (tmp_path / "a").iterdir()} == {*LISTING[name], "adapter_config.json"}


@pytest.mark.parametrize("name", LISTING)
def test_an_original_directory_loads_with_its_yaml(tmp_path, name):
    trained = model(CONFIG_OF[name])
    state = trained.state_dict()
    for file, keys in LISTING[name].items():
        prefix = file.removesuffix("pt")
        torch.save({key: state[prefix + key] for key in keys}, tmp_path / file)
    unet = fresh(CONFIG_OF[name])
    unet.load_adapter_from_dir(tmp_path)
    assert torch.equal(run(unet), run(trained))


def test_the_originals_reader_finds_a_file_for_every_module(saved):
    """It goes through the modules whose name has a file, and loads that strictly."""
    unet, trained = fresh(), model()
    files = {file.name.removesuffix(".pt"): file for file in saved.glob("*.pt")}
    for name, module in unet.named_modules():
        if name in files:
            module.load_state_dict(torch.load(files.pop(name), weights_only=True))
    assert not files
    assert torch.equal(run(unet), run(trained))


def test_round_trip(saved):
    unet = fresh()
    unet.load_adapter_from_dir(saved)
    assert torch.equal(run(unet), run(model()))


def test_a_manifest_is_enough_to_inject(saved):
    unet = spatial_unet()
    unet.load_adapter_from_dir(saved)
    assert torch.equal(run(unet), run(model()))


def test_manifest_says_what_it_is(saved):
    manifest = adapter_files.read_manifest(saved)
    assert manifest["format_version"] == 1
    assert manifest["trained_on"] == {"class_word": "dog", "step": 500}
    assert adapters.parse_config(manifest["adapter_config"]) == adapters.parse_config(CONFIG)
    assert manifest["parameters"] == sum(p.numel() for p in model().adapter_parameters())


def test_lists_of_several(tmp_path):
    config = {
        "transformer_adp_config": [
            *CONFIG["transformer_adp_config"],
            {"din": "attn1i", "dout": "transo", "mid_dim": 2},
        ],
        **RESIDUAL,
    }
    trained = model(config)
    trained.save_adapter_to_dir(tmp_path / "a")
    assert (tmp_path / "a" / "middle_block.1.transformer_blocks.0.adapter_inout_1.adp.pt").is_file()
    unet = spatial_unet()
    unet.load_adapter_from_dir(tmp_path / "a")
    assert torch.equal(run(unet), run(trained))


def test_a_second_set_is_saved_as_if_alone(tmp_path, saved):
    unet = model()
    adapter_files.load(unet, saved, adapter_set="second")
    adapter_files.save(unet, tmp_path / "second", adapter_set="second")
    assert shapes_in(tmp_path / "second") == LISTING["attn2o-ffni"]


def test_saving_again_replaces(saved):
    model(change_config(mid_dim=2)).save_adapter_to_dir(saved)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    unet = fresh(change_config(mid_dim=2))
    unet.load_adapter_from_dir(saved)


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        model().save_adapter_to_dir(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_to_save(tmp_path):
    with pytest.raises(UserError, match="no adapters"):
        spatial_unet().save_adapter_to_dir(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def one_file(directory):
    return directory / "middle_block.1.transformer_blocks.0.adapter_inout.pt"


def remove_block(directory):
    one_file(directory).unlink()
    one_file(directory).with_suffix(".adp.pt").unlink()


def write_state(directory, change):
    state = torch.load(one_file(directory), weights_only=True)
    torch.save(change(state), one_file(directory))


class Payload:
    def __reduce__(self):
        return print, ("code of a stranger runs",)


DAMAGE = {
    "lacks a block": (remove_block, "lacks middle_block.1.transformer_blocks.0.adapter_inout.pt"),
    "has a stranger's file": (
        lambda d: shutil.copy(one_file(d), d / "input_blocks.9.1.adapter.pt"),
        "has files for adapters that the model has not: input_blocks.9.1.adapter.pt",
    ),
    "is empty": (lambda d: [file.unlink() for file in d.iterdir()], "holds no adapter files"),
    "was cut off": (
        lambda d: one_file(d).write_bytes(one_file(d).read_bytes()[:300]),
        "cannot be read as tensors",
    ),
    "is text": (lambda d: one_file(d).write_text("hello"), "cannot be read as tensors"),
    "runs code": (lambda d: torch.save(Payload(), one_file(d)), "cannot be read as tensors"),
    "is no state dict": (lambda d: torch.save([1, 2], one_file(d)), "holds no state dict"),
    "has other keys": (lambda d: write_state(d, lambda s: {"weight": s["adp.0.weight"]}), "the model needs"),
    "is not finite": (
        lambda d: write_state(d, lambda s: {k: v * float("nan") for k, v in s.items()}),
        "not finite",
    ),
    "contradicts itself": (
        lambda d: write_state(d, lambda s: {k: v + 1 for k, v in s.items()}),
        "two different",
    ),
    "has a broken manifest": (lambda d: (d / "adapter_config.json").write_text("{"), "is damaged"),
    "has a wrong manifest": (
        lambda d: (d / "adapter_config.json").write_text('{"format_version": 1, "adapter_config": {"x": [1]}}'),
        "is damaged: adapter_config.x is unknown",
    ),
    "is from the future": (
        lambda d: (d / "adapter_config.json").write_text(json.dumps({"format_version": 9, "adapter_config": CONFIG})),
        "format_version 9",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("injected", [True, False])
def test_a_damaged_directory_changes_nothing(saved, damage, injected):
    break_it, message = DAMAGE[damage]
    break_it(saved)
    unet = fresh() if injected else spatial_unet()
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        unet.load_adapter_from_dir(saved)
    assert "\n" not in str(caught.value)
    assert list(unet.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mid_dim": 5}, "trained with transformer_adp_config.mid_dim 6, the model's config says 5"),
        (
            {"dout": "transo"},
            "trained with transformer_adp_config.dout 'ffni', the model's config says 'transo'",
        ),
        ({"method": "silu"}, "method"),
        ({"scale": 1.0}, "scale 0.7, the model's config says 1.0.*--adapter_scale"),
    ],
)
def test_another_config_is_refused(saved, changes, message):
    with pytest.raises(UserError, match=message):
        fresh(change_config(**changes)).load_adapter_from_dir(saved)


def test_more_adapters_than_were_trained_are_refused(saved):
    with pytest.raises(UserError, match="trained with 1 adapters a block, the model's config has 2"):
        fresh(CONFIG | RESIDUAL).load_adapter_from_dir(saved)


def test_another_init_is_no_other_config(saved):
    fresh(change_config(init="default", method="relu")).load_adapter_from_dir(saved)


def test_an_original_directory_of_another_size_is_refused(saved):
    (saved / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"shape \[6, \d+\].*wants \[5, \d+\].*mid_dim"):
        fresh(change_config(mid_dim=5)).load_adapter_from_dir(saved)


def test_an_original_directory_needs_its_yaml(saved):
    (saved / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no adapter_config.json.*--config"):
        spatial_unet().load_adapter_from_dir(saved)


@pytest.mark.parametrize(
    "make, message", [(lambda p: None, "does not exist"), (lambda p: p.write_text(""), "is a file")]
)
def test_no_directory(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        fresh().load_adapter_from_dir(tmp_path / "x")
