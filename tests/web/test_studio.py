"""What the page draws is what the functions draw that the scripts use, and every picture can be made again."""

import base64
import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.exchange import lora as lora_files
from ldm.inference import img2img, inpaint, load_model, txt2img
from ldm.modules import adapters
from ldm.web import brush
from ldm.web.gallery import Request
from ldm.web.jobs import Job, JobStopped
from ldm.web.studio import Studio
from tests.web.running import CKPT, CONFIG, until

ASKED = {
    "prompt": "a large red circle on a white background", "negative_prompt": "", "sampler": "dpm_solver",
    "schedule": "uniform", "steps": 2, "scale": 3.0, "eta": None, "seed": 5, "count": 1, "height": 64, "width": 64,
    "side": 64, "strength": 0.6, "prompt_weighting": False, "clip_skip": None, "adapters": [],
}  # fmt: skip


def drawn(studio: Studio, request: Request) -> list[np.ndarray]:
    """The pictures of a request, as the worker makes them and as they lie on disk."""
    job = Job("", lambda _: None)
    studio._draw(request, job)
    return [np.asarray(Image.open(studio.gallery.path(name))) for name in job.results]


def scene(size: tuple[int, int] = (64, 64)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))


def test_pictures_are_those_of_the_scripts_functions(studio: Studio, model: torch.nn.Module) -> None:
    common = dict(sampler="dpm_solver", steps=2, scale=3.0, seed=5, precision="full", progress=False)
    prompt = ASKED["prompt"]
    (ours,) = drawn(studio, studio.request("text", ASKED))
    assert np.array_equal(ours, txt2img(model, prompt, **common)[0].image)
    hole = Image.new("L", (64, 64))
    hole.paste(255, (20, 20, 50, 50))
    images = {"image": scene(), "mask": hole}
    (ours,) = drawn(studio, studio.request("image", ASKED | images))
    assert np.array_equal(ours, img2img(model, scene(), prompt, strength=0.6, **common)[0].image)
    (ours,) = drawn(studio, studio.request("inpaint", ASKED | images))
    assert np.array_equal(ours, inpaint(model, scene(), hole, prompt, strength=0.6, **common)[0].image)


def test_use_again_gives_the_same_picture_from_its_settings_alone(studio: Studio) -> None:
    asked = ASKED | {"sampler": "euler_ancestral", "schedule": "karras", "count": 2, "eta": 0.5, "strength": 0.8}
    hole = Image.new("L", (64, 64), 255)
    pictures = drawn(studio, studio.request("inpaint", asked | {"image": scene((90, 60)), "mask": hole}))
    assert pictures[0].shape == (43, 64, 3) and not np.array_equal(*pictures)
    for name, first in zip(sorted(studio.gallery.names()), pictures, strict=True):
        record = json.loads((studio.gallery.pictures / name).with_suffix(".json").read_text())
        (again,) = drawn(studio, Request.of_record(record))
        assert np.array_equal(again, first)
        text = Image.open(studio.gallery.path(name)).text["parameters"]
        assert text == record["parameters"] and "Sampler: Euler a Karras" in text


def test_stop_after_this_picture_keeps_it_and_stop_now_draws_none(studio: Studio) -> None:
    request = studio.request("text", ASKED | {"count": 3})
    for stop, kept in (({"stop_after_picture": True}, 1), ({"stop_now": True}, 0)):
        job = Job("", lambda _: None, **stop)
        with pytest.raises(JobStopped):
            studio._draw(request, job)
        assert len(job.results) == kept


def test_a_preview_and_how_far_it_is(studio: Studio) -> None:
    lines, previews = [], []

    class Watched(Job):
        def say(self, line: str, done: float | None = None) -> None:
            super().say(line, done)
            lines.append((line, self.done))
            previews.append(self.preview)

    studio._draw(studio.request("text", ASKED | {"count": 2, "steps": 3}), Watched("", lambda _: None))
    assert [done for _, done in lines] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert lines[4][0].startswith("picture 2 of 2, step 1 of 3, ")
    assert any(preview.startswith(b"\xff\xd8") for preview in previews), "a JPEG"


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"width": 10**9}, "Width"),
    ("text", {"height": 256}, "Height"),
    ("text", {"height": 60}, "multiple of"),
    ("text", {"steps": 51}, "Steps"),
    ("text", {"count": 5}, "Pictures"),
    ("text", {"seed": 2**32}, "Seed"),
    ("text", {"sampler": "../../x"}, "Sampler"),
    ("text", {"schedule": ["karras"], "sampler": "euler"}, "Schedule"),
    ("text", {"eta": 0.5}, "draws no noise"),
    ("text", {"prompt": None, "negative_prompt": 3}, "Negative prompt"),
    ("text", {"adapters": [("../../../etc", 1.0)]}, "Adapter"),
    ("text", {"adapters": [("mine", 1.0), ("mine", 0.5)]}, "twice"),
    ("text", {"adapters": [("mine", 99)]}, "Weight of 'mine'"),
    ("image", {"side": 4096}, "Longer side"),
    ("image", {"strength": 0}, "Strength"),
    ("inpaint", {"mask": Image.new("L", (64, 64))}, "mask: it is black"),
]


@pytest.mark.parametrize(("kind", "wrong", "said"), WRONG)
def test_what_is_too_much_or_wrong_is_refused_in_one_line(
    studio: Studio, kind: str, wrong: dict[str, Any], said: str
) -> None:
    (Path(studio.options.adapters[0]) / "mine").mkdir()
    (Path(studio.options.adapters[0]) / "mine" / "x.pt").write_bytes(b"")
    asked = ASKED | {"image": scene(), "mask": Image.new("L", (64, 64), 255)} | wrong
    with pytest.raises(UserError, match=said) as error:
        studio.request(kind, asked)
    assert "\n" not in str(error.value)


def test_a_full_queue_is_told_before_anything_is_written(studio: Studio) -> None:
    go = threading.Event()
    studio.jobs.submit(Job("runs", lambda _: go.wait(60) and None))
    until(lambda: studio.jobs.current, 60)
    for _ in range(3):
        studio.jobs.submit(Job("waits", lambda _: None))
    with pytest.raises(UserError, match="3 jobs are waiting already"):
        studio.request("image", ASKED | {"image": scene()})
    go.set()
    assert not list(studio.gallery.inputs.iterdir())


def test_adapters_and_lora_are_worn_as_when_loaded_and_taken_off_to_the_bit(
    studio: Studio, model: torch.nn.Module
) -> None:
    folder = Path(studio.options.adapters[0])
    unet = model.model.diffusion_model
    base = {name: value.clone() for name, value in model.state_dict().items()}
    spec = {"transformer_adp_config": [{"din": "attn2o", "dout": "ffni", "mid_dim": 4, "init": "default"}]}
    torch.manual_seed(0)
    for name in ("one", "two"):
        adapters.inject(unet, spec)
        unet.save_adapter_to_dir(folder / name)
        adapters.eject(unet)
    layer = next(name for name, _ in unet.named_parameters() if name.endswith("attn1.to_q.weight"))[: -len(".weight")]
    out, into = unet.get_parameter(f"{layer}.weight").shape
    layer = f"model.diffusion_model.{layer}"
    weights = {f"{layer}.lora_A.weight": torch.randn(2, into), f"{layer}.lora_B.weight": torch.randn(out, 2)}
    lora_files.write(weights, model.yaml_params, folder / "three.safetensors")

    def picture(of: torch.nn.Module) -> np.ndarray:
        return np.asarray(txt2img(of, "a red circle", steps=2, precision="full", progress=False)[0].image)

    assert set(studio.shelf.all()) == {"one", "two", "three.safetensors"}
    plain = picture(model)
    loaded = load_model(CONFIG, CKPT, "cpu", artefacts={folder / "one": 0.7, folder / "three.safetensors": 0.5})
    studio.wear({"one": 0.7, "three.safetensors": 0.5})
    assert np.array_equal(picture(model), picture(loaded)) and not np.array_equal(picture(model), plain)
    studio.wear({"one": 0.7, "two": -1.0})
    both = picture(model)
    studio.wear({"one": 0.7})
    assert not np.array_equal(picture(model), both), "several at once"
    (folder / "two" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        studio.wear({"one": 0.7, "two": 1.0})
    studio.wear({})
    after = model.state_dict()
    assert after.keys() == base.keys() and all(torch.equal(after[name], base[name]) for name in base)
    assert np.array_equal(picture(model), plain)


def test_what_was_brushed_is_the_mask_and_comes_back_when_used_again(tmp_path: Path) -> None:
    def sent(image: Image.Image, kind: str = "PNG") -> str:
        written = io.BytesIO()
        image.save(written, kind)
        return brush.START + base64.b64encode(written.getvalue()).decode()

    canvas = Image.new("RGBA", (32, 32))
    canvas.paste((99, 102, 241, 255), (2, 2, 5, 5))
    canvas.paste((99, 102, 241, 120), (15, 15, 20, 25))
    hole = brush.mask_of(sent(canvas), (64, 64))
    expected = np.zeros((64, 64), bool)
    expected[4:10, 4:10] = expected[30:50, 30:40] = True
    assert np.array_equal(np.asarray(hole) == 255, expected)
    hole.save(tmp_path / "mask.png")
    again = re.search(r'src="([^"]*)"', brush.shown_again(tmp_path / "mask.png"))
    assert np.array_equal(np.asarray(brush.mask_of(again[1], (64, 64))), np.asarray(hole))
    large = Image.new("RGBA", (2000, 9), "red")
    for wrong in ("", None, 7, [], "data:image/png;base64,%%", "x", sent(Image.new("RGBA", (9, 9))), sent(large),
                  sent(Image.new("RGB", (9, 9)), "GIF")):  # fmt: skip
        with pytest.raises(UserError, match="^Mask: "):
            brush.mask_of(wrong, (64, 64))
