"""How pictures are drawn: number formats, solvers, memory, text, previews, the progress bar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.errors import UserError
from ldm.inference import Preview, img2img, load_model, load_vae, txt2img
from ldm.precision import dtype_of
from tests.cli.sampling_model import write_model

QUICK = {"steps": 3, "progress": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(files: tuple[Path, Path]) -> nn.Module:
    return load_model(*files, "cpu")


def drawn(model: nn.Module, prompt: str = "a cat", **options: object) -> np.ndarray:
    return np.asarray(txt2img(model, prompt, **QUICK | options)[0].image).astype(int)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_halves_the_weights_and_draws_nearly_the_same(
    files: tuple[Path, Path], model: nn.Module, precision: str, dtype: torch.dtype
) -> None:
    full = drawn(model, precision="full")
    np.testing.assert_array_equal(full, drawn(model, precision="autocast"))  # half precision is for CUDA
    halved = load_model(*files, "cpu")
    picture = txt2img(halved, "a cat", precision=precision, **QUICK)[0]
    assert {dtype_of(part) for part in (halved.model, halved.first_stage_model, halved.cond_stage_model)} == {dtype}
    assert 0 < np.abs(full - np.asarray(picture.image)).mean() < 0.1 * full.std()
    assert f"Precision: {precision}" in picture.settings.parameters()


def test_an_autoencoder_too_large_for_half_precision_decodes_in_full(files: tuple[Path, Path]) -> None:
    model = load_model(*files, "cpu")
    decoder = model.first_stage_model.decoder
    decoder.conv_in.weight *= 1e4  # its outputs go beyond 65504; the norms after it take the factor out again
    decoder.conv_in.bias *= 1e4
    full = drawn(model, precision="full")
    half = drawn(model, precision="fp16")
    assert full.std() > 1
    assert dtype_of(model.first_stage_model) == torch.float32 and dtype_of(model.model) == torch.float16
    assert np.abs(full - half).mean() < 0.1 * full.std()


def test_what_is_no_picture_is_an_error(files: tuple[Path, Path]) -> None:
    model = load_model(*files, "cpu")
    model.model.diffusion_model.out[2].bias.fill_(torch.nan)
    with pytest.raises(UserError, match="not numbers.*--precision full"):
        drawn(model)


@pytest.mark.parametrize(
    "solver, title",
    [
        ({}, "DPM++ 2M"),
        ({"order": 3}, "DPM++ 3M"),
        ({"order": 2, "method": "singlestep"}, "DPM++ 2S"),
        ({"algorithm": "dpmsolver", "order": 1}, "DPM 1M"),
        ({"algorithm": "dpmsolver", "order": 3, "method": "singlestep", "spacing": "logSNR"}, "DPM 3S"),
    ],
)
def test_every_solver_has_its_name_and_settings(model: nn.Module, solver: dict[str, object], title: str) -> None:
    picture = txt2img(model, "a cat", sampler="dpm_solver", solver=solver, **QUICK)[0]
    assert picture.settings.sampler == title
    assert ("Solver: spacing logSNR" in picture.settings.parameters()) == ("spacing" in solver)


def test_solvers_and_thresholding_change_the_picture(model: nn.Module) -> None:
    def draw(**solver: object) -> np.ndarray:
        return drawn(model, sampler="dpm_solver", solver=solver, steps=6)

    settings = [{"order": 1}, {"order": 3}, {"method": "singlestep"}, {"algorithm": "dpmsolver"}]
    settings += [{"spacing": "time_quadratic"}, {"thresholding": True}]
    for other in settings:
        assert np.abs(draw() - draw(**other)).max() > 1, other


def test_less_memory_for_nearly_the_same_picture(model: nn.Module) -> None:
    large = {"height": 264, "width": 256, "steps": 1}
    whole = drawn(model, **large)
    sliced = drawn(model, attention_slicing=True, **large)
    tiled = drawn(model, vae_tiling=True, **large)
    assert np.abs(whole - sliced).max() <= 1
    assert 0 < np.abs(whole - tiled).mean() < 0.3 * whole.std()


def test_weights_in_prompts_are_text_unless_asked_for(model: nn.Module) -> None:
    weighted = drawn(model, "a (cat:1.4)", prompt_weighting=True)
    assert np.abs(weighted - drawn(model, "a (cat:1.4)")).max() > 1
    assert np.abs(weighted - drawn(model, "a cat", prompt_weighting=True)).max() > 1
    np.testing.assert_array_equal(drawn(model), drawn(model, prompt_weighting=True))


def test_clip_skip_of_the_last_layer_is_none(model: nn.Module) -> None:
    np.testing.assert_array_equal(drawn(model), drawn(model, clip_skip=1))
    with pytest.raises(UserError, match="clip_skip 2: this text encoder has 1 layers"):
        drawn(model, clip_skip=2)


def test_another_autoencoder_changes_the_picture_and_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(*files, "cpu")
    before = drawn(model)
    other = {k: 1.3 * v for k, v in model.first_stage_model.state_dict().items()}
    torch.save({"state_dict": other}, tmp_path / "sharper.ckpt")
    load_vae(model, tmp_path / "sharper.ckpt")
    picture = txt2img(model, "a cat", **QUICK)[0]
    assert np.abs(before - np.asarray(picture.image)).max() > 1
    assert "VAE: sharper" in picture.settings.parameters()


def test_a_prompt_that_is_too_long_says_what_is_left_out(model: nn.Module) -> None:
    long = " ".join(["dog"] * 75)
    with pytest.warns(UserWarning, match="longer than 75 tokens; left out: 'and a Café'"):
        cut = drawn(model, f"{long} and a Café")
    np.testing.assert_array_equal(cut, drawn(model, long))


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver", "euler", "heun", "dpmpp_2m_sde"])
def test_previews_come_after_every_step_and_end_at_the_picture(model: nn.Module, sampler: str) -> None:
    seen: list[tuple[Preview, Image.Image]] = []
    options = {"steps": 20, "sampler": sampler, "progress": False}
    pictures = txt2img(model, ["a", "b"], callback=lambda p: seen.append((p, p.images()[0])), **options)
    assert [(p.step, p.steps, list(p.pictures)) for p, _ in seen] == [
        (step, 20, [place]) for place in (0, 1) for step in range(1, 21)
    ]
    for first, last, picture in ((0, 19, pictures[0]), (20, 39, pictures[1])):
        final = np.asarray(picture.image).astype(int)
        errors = [np.abs(np.asarray(seen[i][1]) - final).mean() for i in (first, last)]
        assert errors[1] < 0.25 * errors[0]
    np.testing.assert_array_equal(np.asarray(pictures[0].image), drawn(model, "a", **options))


def test_a_callback_can_end_the_run(model: nn.Module) -> None:
    class Enough(Exception):
        pass

    def stop(preview: Preview) -> None:
        assert preview.steps == 2  # of four, at half strength
        raise Enough

    with pytest.raises(Enough):
        img2img(model, Image.new("RGB", (32, 32)), "a", strength=0.5, steps=4, progress=False, callback=stop)
    drawn(model)  # the model is as it was


def test_the_progress_bar_has_the_step_and_the_picture(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    txt2img(model, ["a", "b", "c"], steps=4, batch_size=2, exact=False)
    bar = capsys.readouterr().err
    assert "DDIM, pictures 1-2 of 3:" in bar and "DDIM, picture 3 of 3:" in bar and "/4 [" in bar
    drawn(model)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "eular"}, "sampler: 'eular' is none of ddim, plms, dpm_solver, lcm, euler"),
        (
            {"sampler": "plms", "eta": 0.5},
            "eta 0.5: the sampler plms draws no noise in its steps that could be chosen; ddim, euler_ancestral",
        ),
        ({"sampler": "euler_ancestral", "eta": 1.5}, "eta 1.5: must be between 0 and 1"),
        ({"solver": {"order": 3}}, "order: the sampler ddim has no such setting; dpm_solver, lms, dpm_adaptive have"),
        ({"sampler": "heun", "solver": {"churn": 3}}, "churn: the sampler heun has no such setting; it takes s_churn"),
        ({"sampler": "heun", "solver": {"s_churn": -3}}, "s_churn -3: must be 0 or more"),
        ({"sampler": "heun", "schedule": "linear"}, "schedule: 'linear' is none of uniform, karras"),
        ({"schedule": "karras"}, "schedule karras: the sampler ddim has its own steps"),
        ({"sampler": "heun", "solver": {"rho": 5}}, "rho: only the schedules karras and polyexponential have it"),
        ({"sampler": "heun", "schedule": "karras", "solver": {"rho": 0}}, "rho 0: must be above 0"),
        ({"sampler": "dpm_solver", "solver": {"order": 4}}, "order '4' is none of 1, 2, 3"),
        ({"precision": "fp8"}, "precision: 'fp8' is none of full, autocast, bf16, fp16"),
        ({"seeds": [1, 2]}, "seeds: 2 for 1 prompts"),
        ({"height": 2**30, "width": 2**30}, "memory of the device cpu is too small.*--attention_slicing"),
        ({"steps": 0}, "sampling steps: 0 is not within 1 .. 1000"),
    ],
)
def test_options_that_cannot_be(model: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        drawn(model, **options)
