"""Every bad input of the sampling programs ends in one line and exit code 2; nothing is run or written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import cli
from ldm.errors import UserError
from ldm.util import load_yaml
from tests.cli.sampling_model import main_of, write_model
from tests.programs import run


class RunsCode:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good model and everything that can be wrong beside it."""
    folder = tmp_path_factory.mktemp("files")
    config, checkpoint = write_model(folder)
    text = config.read_text(encoding="utf-8")
    (folder / "typo.yaml").write_text(text.replace("model_channels", "model_chanels"), encoding="utf-8")
    (folder / "target.yaml").write_text(text.replace("openaimodel.UNetModel", "openaimodel.UNet"), encoding="utf-8")
    (folder / "wide.yaml").write_text(text.replace("model_channels: 32", "model_channels: 64"), encoding="utf-8")
    (folder / "broken.yaml").write_text("model: [", encoding="utf-8")
    (folder / "other.yaml").write_text("a: 1", encoding="utf-8")
    (folder / "text.ckpt").write_text("these are no weights")
    (folder / "empty.ckpt").touch()
    (folder / "short.ckpt").write_bytes(checkpoint.read_bytes()[:-2000])
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "x": RunsCode(folder / "trace")}, folder / "evil.ckpt")
    half = {k: v for k, v in state.items() if not k.startswith("first_stage_model.decoder")}
    torch.save({"state_dict": half}, folder / "half.ckpt")
    torch.save({"a": torch.zeros(2)}, folder / "foreign.ckpt")
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    picture.save(folder / "good.png")
    Image.new("L", (64, 64)).save(folder / "black.png")
    Image.new("L", (32, 32), 255).save(folder / "small.png")
    picture.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:600])
    (folder / "blank.txt").write_text("\n \n")
    (folder / "no_adapters").mkdir()
    (folder / "old_adapters").mkdir()
    torch.save({}, folder / "old_adapters" / "middle_block.1.adapter_inout.pt")
    return folder


NOT_HERE = "mps" if torch.cuda.is_available() else "cuda"
IMAGE = ["--init-img", "{}/good.png"]
# script, flags, words of the message; {} is the folder
BAD_INPUTS = {
    "unknown flag": ("scripts/txt2img.py", ["--model", "x"], ["--model"]),
    "unknown override": ("scripts/txt2img.py", ["model.params.x=1"], ["model.params.x=1"]),
    "steps no number": ("scripts/txt2img.py", ["--ddim_steps", "many"], ["--ddim_steps"]),
    "no steps": ("scripts/txt2img.py", ["--ddim_steps", "0"], ["--ddim_steps 0", "at least 1"]),
    "too many steps": ("scripts/txt2img.py", ["--ddim_steps", "1001"], ["--ddim_steps 1001", "1000"]),
    "no samples": ("sample.py", ["--n_samples", "0"], ["--n_samples 0"]),
    "eta": ("scripts/txt2img.py", ["--ddim_eta", "1.5"], ["--ddim_eta 1.5", "between 0 and 1"]),
    "eta with plms": ("scripts/txt2img.py", ["--ddim_eta", "1", "--plms"], ["DDIM", "--plms"]),
    "two samplers": ("scripts/txt2img.py", ["--plms", "--dpm_solver"], ["exclude each other"]),
    "sampler and another": ("scripts/txt2img.py", ["--plms", "--sampler", "lms"], ["--plms and --sampler lms exclude"]),
    "no sampler": ("scripts/txt2img.py", ["--sampler", "eular"], ["--sampler", "'eular'", "euler"]),
    "schedule of ddim": ("scripts/txt2img.py", ["--schedule", "vp"], ["--schedule vp", "ddim has its own steps"]),
    "ddim's eta": ("scripts/txt2img.py", ["--eta", "1"], ["--eta 1", "--ddim_eta"]),
    "eta of an ODE": ("scripts/txt2img.py", ["--eta", "1", "--sampler", "heun"], ["--eta 1", "heun draws no noise"]),
    "eta of DDIM elsewhere": (
        "sample.py",
        ["--ddim_eta", "1", "--sampler", "heun"],
        ["--ddim_eta 1", "--sampler heun out"],
    ),
    "eta above 1": ("sample.py", ["--eta", "2", "--sampler", "dpmpp_sde"], ["--eta 2", "between 0 and 1"]),
    "churn": ("scripts/txt2img.py", ["--s_churn", "9", "--sampler", "lms"], ["--s_churn", "euler, heun, dpm_2 have"]),
    "rho": ("scripts/txt2img.py", ["--rho", "5", "--sampler", "lms"], ["--rho", "karras and polyexponential"]),
    "seed": ("scripts/txt2img.py", ["--seed", "-1"], ["--seed -1"]),
    "precision": ("scripts/txt2img.py", ["--precision", "double"], ["--precision"]),
    "device": ("scripts/txt2img.py", ["--device", "gpu"], ["--device gpu", "cuda"]),
    "device that is not there": ("scripts/txt2img.py", ["--device", NOT_HERE], [f"--device {NOT_HERE}", "no "]),
    "empty prompt flag": ("scripts/txt2img.py", ["--prompt"], ["--prompt"]),
    "embedding": ("sample.py", ["--embedding_path", "x.pt"], ["--embedding_path", "there is no file"]),
    "height": ("scripts/txt2img.py", ["--H", "44"], ["--H 44", "multiple of 8", "nearest is 48"]),
    "channels": ("scripts/txt2img.py", ["--C", "3"], ["--C 3", "4"]),
    "factor": ("scripts/txt2img.py", ["--f", "8"], ["--f 8", "4"]),
    "clip skip 0": ("scripts/txt2img.py", ["--clip_skip", "0"], ["--clip_skip 0", "at least 1"]),
    "clip skip": ("scripts/txt2img.py", ["--clip_skip", "2"], ["clip_skip 2", "1 layers"]),
    "solver": ("scripts/txt2img.py", ["--plms", "--dpm_order", "3"], ["--dpm_order", "--dpm_solver"]),
    "solver order": ("sample.py", ["--dpm_order", "4"], ["--dpm_order", "1, 2, 3"]),
    "weight": (
        "sample.py",
        ["--prompt_weighting", "--prompt", "(cat:1000)"],
        ["weight 1000", "around 1"],
    ),
    "no vae": ("sample.py", ["--vae", "{}/none.ckpt"], ["--vae", "none.ckpt"]),
    "vae is text": ("sample.py", ["--vae", "{}/text.ckpt"], ["--vae", "text.ckpt", "neither"]),
    "vae of another model": ("sample.py", ["--vae", "{}/foreign.ckpt"], ["--vae", "foreign.ckpt"]),
    "vae runs code": ("sample.py", ["--vae", "{}/evil.ckpt"], ["evil.ckpt", ".mkdir", "refused"]),
    "no ckpt": ("scripts/txt2img.py", ["--ckpt", "{}/none.ckpt"], ["none.ckpt"]),
    "ckpt is a folder": ("sample.py", ["--ckpt", "{}"], ["is a folder"]),
    "ckpt is text": ("sample.py", ["--ckpt", "{}/text.ckpt"], ["text.ckpt", "neither"]),
    "ckpt is empty": ("sample.py", ["--ckpt", "{}/empty.ckpt"], ["empty.ckpt", "is empty"]),
    "ckpt is cut": ("sample.py", ["--ckpt", "{}/short.ckpt"], ["short.ckpt", "damaged"]),
    "ckpt runs code": ("sample.py", ["--ckpt", "{}/evil.ckpt"], ["evil.ckpt", ".mkdir", "refused"]),
    "ckpt lacks weights": ("sample.py", ["--ckpt", "{}/half.ckpt"], ["lacks", "first_stage_model.decoder"]),
    "ckpt of another model": ("sample.py", ["--ckpt", "{}/foreign.ckpt"], ["foreign.ckpt", "another yaml"]),
    "ckpt of other sizes": (
        "sample.py",
        ["--config", "{}/wide.yaml"],
        ["misshapen", "model.diffusion_model"],
    ),
    "no config": ("sample.py", ["--config", "{}/none.yaml"], ["--config", "none.yaml"]),
    "yaml broken": ("sample.py", ["--config", "{}/broken.yaml"], ["broken.yaml"]),
    "yaml without model": ("sample.py", ["--config", "{}/other.yaml"], ["model:"]),
    "yaml key": ("sample.py", ["--config", "{}/typo.yaml"], ["UNetModel", "model_chanels"]),
    "yaml target": ("sample.py", ["--config", "{}/target.yaml"], ["openaimodel", "UNet"]),
    "prompt file": ("sample.py", ["--from-file", "{}/none.txt"], ["--from-file", "none.txt"]),
    "prompt file blank": ("sample.py", ["--from-file", "{}/blank.txt"], ["holds no prompts"]),
    "prompt file binary": ("sample.py", ["--from-file", "{}/good.png"], ["good.png", "text"]),
    "no adapters": ("sample.py", ["--adapter_path", "{}/none"], ["--adapter_path", "none"]),
    "adapter folder empty": ("sample.py", ["--adapter_path", "{}/no_adapters"], ["no adapter files"]),
    "adapters without yaml": (
        "sample.py",
        ["--adapter_path", "{}/old_adapters"],
        ["--config", "adapter_config"],
    ),
    "outdir is a file": ("sample.py", ["--outdir", "{}/good.png"], ["--outdir"]),
    "no init image": ("scripts/img2img.py", [], ["--init-img"]),
    "init image missing": ("scripts/img2img.py", ["--init-img", "{}/none.png"], ["none.png"]),
    "init image cut": ("scripts/img2img.py", ["--init-img", "{}/cut.jpg"], ["cut.jpg", "cannot be read"]),
    "init image is text": ("scripts/img2img.py", ["--init-img", "{}/blank.txt"], ["blank.txt"]),
    "no mask": ("scripts/inpaint.py", IMAGE, ["--mask", "needs the path"]),
    "mask missing": ("scripts/inpaint.py", [*IMAGE, "--mask", "{}/none.png"], ["--mask", "none.png"]),
    "mask black": ("scripts/inpaint.py", [*IMAGE, "--mask", "{}/black.png"], ["mask", "black"]),
    "mask small": ("scripts/inpaint.py", [*IMAGE, "--mask", "{}/small.png"], ["32x32", "64x64", "same"]),
    "strength 0": ("scripts/img2img.py", [*IMAGE, "--strength", "0"], ["--strength 0", "above 0"]),
    "strength 1.5": ("scripts/img2img.py", [*IMAGE, "--strength", "1.5"], ["--strength 1.5", "at most 1"]),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line(name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, flags, words = BAD_INPUTS[name]
    base = ["--config", "{}/model.yaml", "--ckpt", "{}/model.ckpt", "--outdir", str(tmp_path / "out")]
    argv = [word.replace("{}", str(files)) for word in [*base, *flags]]
    with pytest.raises(SystemExit) as stop:
        cli.run(main_of(script), argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()
    assert not (files / "trace").exists()


def test_a_missing_vocabulary_is_told_before_weights_are_read(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_yaml(files / "model.yaml")
    bert = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {"n_embed": 32, "n_layer": 1}}
    config.model.params.cond_stage_config = bert
    OmegaConf.save(config, "bert.yaml")
    with pytest.raises(UserError, match="BERT's vocabulary: there is no file 'models/bert-base-uncased/vocab.txt'"):
        main_of("scripts/txt2img.py")(["--config", "bert.yaml", "--ckpt", str(files / "foreign.ckpt")])


def test_no_traceback_unless_asked_for(files: Path) -> None:
    flags = ["sample.py", "--config", files / "model.yaml", "--ckpt", files / "evil.ckpt"]
    done = run(*flags)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(UserError):  # shown with its traceback by Python itself
        cli.run(main_of("sample.py"), [*map(str, flags[1:]), "--traceback"])


def test_allow_pickle_is_the_way_around(files: Path, tmp_path: Path) -> None:
    flags = ["sample.py", "--config", files / "model.yaml", "--ckpt", files / "evil.ckpt", "--allow_pickle"]
    flags += ["--outdir", tmp_path, "--ddim_steps", 2, "--n_iter", 1, "--device", "cpu"]
    cli.run(main_of(flags[0]), [str(word) for word in flags[1:]])
    assert (tmp_path / "grid-0000.png").is_file()
    assert (files / "trace").is_dir()
    shutil.rmtree(files / "trace")
