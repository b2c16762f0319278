"""LoRA, words, adapters and weights in a model: as diffusers has them, several at once, and gone without a trace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import artefacts
from ldm.errors import UserError
from ldm.exchange import embeddings, lora_names
from ldm.exchange import lora as files
from ldm.exchange.convert import Conversion
from ldm.loading import load_model
from ldm.models.diffusion.lcm import LCMSampler
from ldm.modules import adapters, lora
from ldm.modules.encoders.weighting import encode_weighted
from scripts.convert import main as convert
from tests.goldens.fill import data
from tests.networks import relative_error
from tests.pipelines import libraries, pipeline

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROMPTS, SEEDS = ["a red fox", "the <toy> sea"], (4, 9)
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    pipeline("v1", root / "parts").save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load_model(None, folder, "cpu")


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    yield loaded
    artefacts.use(loaded, {})


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    diffusers, _ = libraries()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """LoRA of both networks in both formats, an embedding of two vectors, adapters."""
    model = load_model(None, folder, "cpu")
    text = ("q_proj", "out_proj", "fc1")
    config = lora.LoraConfig(rank=3, alpha=1.5, targets=("to_q", "to_out.0", "proj_in"), text_targets=text)
    lora.inject(model.model.diffusion_model, config)
    lora.inject(model.cond_stage_model.transformer, config, config.text_targets)
    weights = {key: data(key, tuple(value.shape), 0.2) for key, value in lora.weights_in(model).items()}
    for form in files.FORMATS:
        files.write(weights, model.yaml_params, folder.parent / f"{form}.safetensors", {"trigger": "a fox"}, form)
    embeddings.write({"<toy>": data("toy", (2, 32))}, folder.parent / "toy.safetensors", {"initializer_words": "sea"})
    embeddings.write({"<toy>": data("toy", (2, 32))}, folder.parent / "toy.pt")
    model = load_model(None, folder, "cpu")
    unet = model.model.diffusion_model
    adapters.inject(unet, {"transformer_adp_config": [{"din": "attn2o", "dout": "ffni", "mid_dim": 3}]})
    for name, parameter in unet.named_parameters():
        if adapters.is_adapter_key(name):
            parameter.data = data(name, tuple(parameter.shape), 0.2)
    unet.save_adapter_to_dir(folder.parent / "adapters", trigger="a fox")
    return folder.parent


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@torch.no_grad()
def our_latents(model: Any) -> torch.Tensor:
    c = model.get_learned_conditioning(PROMPTS)
    return LCMSampler(model).sample(4, 2, (4, 8, 8), c, generator=generators(), show_progress=False)[0]


@torch.no_grad()
def their_latents(pipe: Any) -> torch.Tensor:
    kind = dict(num_inference_steps=4, guidance_scale=1.0, generator=generators(), output_type="latent")
    return pipe(PROMPTS, **kind).images


@pytest.mark.parametrize("form", files.FORMATS)
def test_diffusers_draws_the_same_latents_with_a_lora_of_both_networks(
    form: str, pipe: Any, made: Path, model: Any
) -> None:
    plain = our_latents(model)
    pipe.load_lora_weights(str(made), weight_name=f"{form}.safetensors")
    artefacts.use(model, {made / f"{form}.safetensors": 1.0})
    ours, theirs = our_latents(model), their_latents(pipe)
    pipe.unload_lora_weights()
    assert relative_error(ours, theirs) < 2e-3 < relative_error(ours, plain)


@pytest.mark.parametrize("name", ["toy.safetensors", "toy.pt"])
def test_diffusers_draws_the_same_latents_with_a_new_word(name: str, pipe: Any, made: Path, model: Any) -> None:
    plain = our_latents(model)
    pipe.load_textual_inversion(str(made), weight_name=name)
    artefacts.use(model, {made / name: 1.0})
    ours, theirs = our_latents(model), their_latents(pipe)
    pipe.unload_textual_inversion()
    assert relative_error(ours, theirs) < 2e-3
    assert torch.equal(ours[0], plain[0]) and not torch.equal(ours[1], plain[1])
    weighted = encode_weighted(model.cond_stage_model, PROMPTS)
    assert torch.equal(weighted, model.get_learned_conditioning(PROMPTS))


def test_formats_of_lora_are_turned_into_each_other(folder: Path, made: Path, model: Any, tmp_path: Path) -> None:
    yaml = tmp_path / "model.yaml"
    list(Conversion()(folder, tmp_path / "model.safetensors"))
    for source, form in (("kohya", "diffusers"), ("diffusers", "kohya")):
        target = tmp_path / f"{form}.safetensors"
        convert([str(made / f"{source}.safetensors"), str(target), "--lora_format", form, "--config", str(yaml)])
        ours, theirs = load_file(made / f"{form}.safetensors"), load_file(target)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert files.read_metadata(target)["trigger"] == "a fox"
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    both = [files.read(made / f"{form}.safetensors", model.yaml_params, shapes) for form in files.FORMATS]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0].keys() | both[1].keys())


def test_other_ways_to_write_a_key_are_read(model: Any) -> None:
    layers = [key.removesuffix(".weight") for key in model.state_dict()]
    names = lora_names.LoraNames(model.yaml_params, layers)
    to_q = names.ours("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight")
    assert to_q == "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight"
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    flat = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight"
    for key in (f"{block}.processor.to_q_lora.down.weight", f"{block}.to_q.lora.down.weight", flat):
        assert names.ours(key) == to_q
    text = "text_encoder.text_model.encoder.layers.1.self_attn"
    for key in (f"{text}.q_proj.lora_linear_layer.up.weight", f"{text}.to_q_lora.up.weight"):
        assert names.ours(key) == f"{TEXT}.lora_B.weight"
    assert names.ours("lora_te1_text_model_encoder_layers_1_self_attn_q_proj.alpha") == f"{TEXT}.alpha"


def test_several_at_once_add_up_and_leave_no_trace(made: Path, model: Any) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    latents = our_latents(model)
    loras = [made / f"{form}.safetensors" for form in files.FORMATS]
    artefacts.use(model, {loras[0]: 0.5, loras[1]: 0.25, made / "toy.safetensors": 1.0, made / "adapters": 0.7})
    together = our_latents(model)
    key = f"{TEXT}.weight"
    difference = model.state_dict()[key] - before[key]
    artefacts.use(model, {loras[0]: 0.75})
    torch.testing.assert_close(model.state_dict()[key] - before[key], difference)
    assert not torch.equal(our_latents(model), together)
    artefacts.use(model, {})
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(our_latents(model), latents)


def test_a_strength_of_nothing_is_the_model_without(made: Path, model: Any) -> None:
    latents = our_latents(model)
    artefacts.use(model, {made / "adapters": 0.0, made / "kohya.safetensors": 0.0})
    assert torch.equal(our_latents(model), latents)
    artefacts.use(model, {made / "toy.safetensors": 0.0})
    with_sea = model.get_learned_conditioning(["the <toy>"])
    assert torch.equal(with_sea, model.get_learned_conditioning(["the sea sea"]))
    with pytest.raises(UserError, match="must be 1"):
        artefacts.use(model, {made / "toy.pt": 0.5})


def test_what_artefacts_say_of_themselves(made: Path, model: Any) -> None:
    kinds = {"kohya.safetensors": "lora", "adapters": "adapters", "toy.pt": "embedding"}
    for name, kind in kinds.items():
        assert artefacts.look(made / name).kind == kind
    assert artefacts.look(made / "adapters").trigger == artefacts.look(made / "kohya.safetensors").trigger == "a fox"
    assert artefacts.look(made / "toy.pt").trigger == "<toy>"
    artefacts.use(model, {made / "toy.pt": 1})
    assert model.origin["adapter"] == f"{made / 'toy.pt'} (1)"


def test_what_does_not_fit_is_listed_and_changes_nothing(made: Path, model: Any, tmp_path: Path) -> None:
    artefacts.use(model, {made / "toy.pt": 1.0})
    latents = our_latents(model)
    tensors = load_file(made / "kohya.safetensors")
    save_file({**tensors, "lora_unet_nowhere.lora_down.weight": torch.zeros(3, 3)}, tmp_path / "x.safetensors")
    save_file({"<cat>": torch.zeros(1, 768)}, tmp_path / "wide.safetensors")
    save_file({"a.b": torch.zeros(3)}, tmp_path / "other.safetensors")
    wrong = {"x": "lora_unet_nowhere.lora_down.weight", "wide": "768 numbers", "other": "no adapter directory"}
    for name, said in wrong.items():
        with pytest.raises(UserError, match=said):
            artefacts.use(model, {made / "adapters": 1.0, tmp_path / f"{name}.safetensors": 1.0})
        assert torch.equal(our_latents(model), latents)
    with pytest.raises(UserError, match="already there|there already"):
        artefacts.use(model, {made / "toy.pt": 1.0, made / "toy.safetensors": 1.0})


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_any_error_changes_nothing_and_the_next_call_does_it(
    error: type[BaseException], made: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = {made / "toy.pt": 1.0}, {made / "adapters": 1.0, made / "kohya.safetensors": 1.0}
    artefacts.use(model, after)
    wanted = our_latents(model)
    artefacts.use(model, before)
    latents = our_latents(model)
    with monkeypatch.context() as patch:
        patch.setattr(lora, "merged", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            artefacts.use(model, after)
    assert torch.equal(our_latents(model), latents)
    artefacts.use(model, after)
    assert torch.equal(our_latents(model), wanted)


def test_what_cannot_be_put_back_is_out_entirely(made: Path, model: Any, tmp_path: Path) -> None:
    artefacts.use(model, {})
    plain = our_latents(model)
    (tmp_path / "toy.pt").write_bytes((made / "toy.pt").read_bytes())
    artefacts.use(model, {made / "adapters": 1.0, tmp_path / "toy.pt": 1.0})
    (tmp_path / "toy.pt").unlink()
    with pytest.raises(UserError, match="there is no file"):
        artefacts.use(model, {made / "toy.pt": 0.5})
    artefacts.use(model, {})
    assert torch.equal(our_latents(model), plain)


def test_adapters_and_words_cannot_be_merged_and_lora_can(folder: Path, made: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged.safetensors"
    for name, said in (("adapters", "layers of their own"), ("toy.pt", "a new word")):
        with pytest.raises(UserError, match=said):
            list(Conversion(artefacts={str(made / name): 1.0})(folder, target))
    list(Conversion(artefacts={str(made / "kohya.safetensors"): 0.5})(folder, target))
    merged = load_model(tmp_path / "merged.yaml", target, "cpu").state_dict()
    live = load_model(None, folder, "cpu", artefacts={made / "kohya.safetensors": 0.5}).state_dict()
    assert all(torch.equal(merged[key], live[key]) for key in merged)


def test_files_of_embeddings_by_any_program(made: Path, tmp_path: Path) -> None:
    vectors = data("toy", (2, 32))
    contents = {
        "emb": {"emb_params": vectors},
        "concept": {"<toy>": vectors[0]},
        "original": {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": vectors}},
    }
    torch.save(contents["concept"], tmp_path / "concept.bin")
    torch.save(contents["original"], tmp_path / "original.pt")
    save_file(contents["emb"], tmp_path / "emb.safetensors")
    assert torch.equal(embeddings.read(tmp_path / "emb.safetensors")["emb"], vectors)
    assert torch.equal(embeddings.read(tmp_path / "concept.bin")["<toy>"], vectors[:1])
    assert torch.equal(embeddings.read(tmp_path / "original.pt")["original"], vectors)
    convert([str(made / "toy.safetensors"), str(tmp_path / "again.pt")])
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again["name"] == "<toy>" and torch.equal(again["string_to_param"]["*"], vectors)
    with safe_open(made / "toy.safetensors", "pt") as file:
        assert list(file.keys()) == ["<toy>"]


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"<toy>": torch.zeros(1, 32), "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="mkdir"):
        artefacts.look(tmp_path / "evil.pt")
    assert not Path("evil").exists()
