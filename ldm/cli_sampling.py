"""The command lines that draw pictures: their flags, and the way through them."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import cli
from ldm.cli_checks import SD_CKPT, SD_CONFIG, check_flags, check_paths, read_artefacts, read_image, read_prompts
from ldm.errors import UserError
from ldm.samplers import SAMPLERS, SCHEDULES

if TYPE_CHECKING:
    from ldm.inference import Picture


def sampling_parser(
    description: str,
    outdir: str,
    n_samples: int,
    n_iter: int,
    scale: float,
    image: bool = False,
    mask: bool = False,
    strength: float = 0.75,
) -> cli.ArgumentParser:
    """The flags of CompVis' txt2img.py (img2img.py with `image`) and of the adapter repository's sample.py.

    Args:
        outdir, n_samples, n_iter, scale, strength: defaults, in which the original scripts differ.
        mask: with an image, which part of it is redrawn.
    """
    parser = cli.ArgumentParser(description=description)
    flag = parser.add_argument
    flag(
        "--prompt",
        nargs="?",
        default="a painting of a virus monster playing guitar",
        help="the prompt to render",
    )
    if image:
        flag("--init-img", nargs="?", help="path to the input image")
    if mask:
        flag("--mask", nargs="?", help="path to an image of the same size, white where the input is redrawn")
    flag("--outdir", nargs="?", default=outdir, help="dir to write results to")
    flag("--skip_grid", action="store_true", help="do not save a grid, only individual samples")
    flag("--skip_save", action="store_true", help="do not save individual samples. For speed measurements.")
    flag("--ddim_steps", type=int, default=50, help="number of sampling steps")
    flag("--plms", action="store_true", help="use plms sampling")
    flag("--dpm_solver", action="store_true", help="use DPM-Solver++ (2M) sampling")
    add_sampler_flags(flag)
    if not image:
        flag("--laion400m", action="store_true", help="uses the LAION400M model")
    flag("--fixed_code", action="store_true", help="use the same starting codes, and seeds, in every iteration")
    flag("--ddim_eta", type=float, default=0.0, help="ddim eta (eta=0.0 corresponds to deterministic sampling)")
    flag("--n_iter", type=int, default=n_iter, help="sample this often")
    flag("--H", type=int, help="height in pixels (default: the image's or model's; 512 for SD v1)")
    flag("--W", type=int, help="width in pixels (default: the image's or model's; 512 for SD v1)")
    flag("--C", type=int, help="latent channels (default: the model's; 4 for SD v1)")
    flag("--f", type=int, help="downsampling factor (default: the model's; 8 for SD v1)")
    flag("--n_samples", type=int, default=n_samples, help="samples for each prompt, a.k.a. batch size")
    flag("--n_rows", type=int, default=0, help="pictures in a row of the grid (0: n_samples)")
    flag("--scale", type=float, default=scale,
         help="guidance scale: eps = eps(x, empty) + scale * (eps(x, cond) - eps(x, empty))")  # fmt: skip
    if image:
        what = "mask" if mask else "image"
        flag("--strength", type=float, default=strength, help=f"noising in (0, 1]; 1.0 keeps nothing of the {what}")
    flag("--from-file", help="if specified, load prompts from this file, one a line")
    flag("--config", default=SD_CONFIG,
         help="path to config which constructs model; when not given, the checkpoint's own comes first: in its "
         "diffusers folder, or beside it as NAME.yaml")  # fmt: skip
    flag("--ckpt", default=SD_CKPT, help="path to checkpoint of model, a diffusers folder, or a model hub's owner/name")
    flag("--seed", type=int, default=42, help="seed of the first picture; the next ones count on from it")
    add_new_flags(parser)
    add_solver_flags(parser)
    return parser


def add_new_flags(parser: cli.ArgumentParser) -> None:
    """What the original scripts do not have."""
    flag = parser.add_argument_group("beyond the original scripts").add_argument
    flag("--adapter_path", help="directory of adapters to put into the model")
    flag(
        "--adapter_scale",
        type=float,
        default=1.0,
        help="strength of the adapters; 0 is the model without them",
    )
    add_artefact_flags(flag)
    flag("--embedding_path", help="embedding of a textual inversion; the same as --adapter")
    flag(
        "--negative_prompt",
        default="",
        help="what the pictures should not show, in place of the empty prompt",
    )
    flag("--prompt_weighting", action="store_true",
         help="read (word:1.2), (word) and [word] in prompts as weights of words")  # fmt: skip
    flag("--clip_skip", type=int, help="stop the text encoder at its last layer but CLIP_SKIP - 1")
    flag("--vae", help="another autoencoder's weights: a file, a diffusers folder, or a model hub's owner/name")
    flag("--batched", action="store_true",
         help="draw n_samples pictures at once: faster on a GPU, but last digits then depend on n_samples")  # fmt: skip
    add_compile_flag(flag)
    add_model_flags(flag)


def add_compile_flag(flag: Callable[..., Any]) -> None:
    """What `load` compiles the network for."""
    flag("--compile", action="store_true",
         help="compile the network's blocks first, on a GPU and for many pictures: on a CPU it took a minute and "
         "made none faster; last digits may differ")  # fmt: skip


def add_artefact_flags(flag: Callable[..., Any]) -> None:
    """What `cli_checks.read_artefacts` reads."""
    flag("--adapter", action="append", metavar="PATH[:STRENGTH]",
         help="what a personalisation left behind, and its strength (1 as trained): a directory of adapters, a LoRA "
         "(diffusers' or kohya's), an embedding, or weights; may be given several times")  # fmt: skip
    flag("--lora", action="append", metavar="FILE[:STRENGTH]", help="the same as --adapter")


def add_model_flags(flag: Callable[..., Any]) -> None:
    """What every program that draws lets people say of the model and of what stands before its pictures."""
    flag("--precision", choices=["full", "autocast", "bf16", "fp16"], default="autocast",
         help="autocast is half precision on CUDA and full precision elsewhere; "
         "bf16 and fp16 also halve the memory of the weights")  # fmt: skip
    flag("--vae_tiling", action="store_true", help="decode in tiles: large pictures in little memory")
    flag("--attention_slicing", action="store_true", help="attention in parts: less memory, the same pictures")
    flag("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    flag("--no_safety_checker", action="store_true", help="show Stable Diffusion's pictures unchecked")
    flag("--safety_checker", help="folder or hub name of the safety checker's weights")
    flag("--no_watermark", action="store_true", help="no invisible watermark in Stable Diffusion's pictures")
    flag("--allow_pickle", action="store_true",
         help="unpickle a .ckpt that imports other things than weights: it may run any code")  # fmt: skip


def add_sampler_flags(flag: Callable[..., Any]) -> None:
    """The sampler by its name, and its levels of noise."""
    flag("--sampler", choices=list(SAMPLERS), help="the sampler; --plms and --dpm_solver are short for two of them")
    flag("--schedule", choices=list(SCHEDULES),
         help="levels of noise of k-diffusion's samplers (euler and those after it), from the model's highest to its "
         "lowest; when not given uniform, the model's own at timesteps evenly apart (sgm_uniform leaves out the "
         "lowest, where next to no noise is left)")  # fmt: skip


def add_solver_flags(parser: cli.ArgumentParser) -> None:
    """Settings of the samplers; each is None when it is not given."""
    flag = parser.add_argument_group("settings of k-diffusion's samplers").add_argument
    flag("--eta", type=float,
         help="noise of the steps of ancestral samplers and SDEs, 0 to 1; when not given 1, but 0 of dpm_fast and "
         "dpm_adaptive")  # fmt: skip
    flag("--rho", type=float, help="of --schedule karras (7 when not given) and polyexponential (1)")
    flag("--s_churn", type=float, help="euler, heun, dpm_2: noise that is added on the way; 0 when not given")
    flag("--s_tmin", type=float, help="lowest level of noise at which it is; 0 when not given")
    flag("--s_tmax", type=float, help="highest level of noise at which it is; any when not given")
    flag("--s_noise", type=float, help="factor of all noise that is added on the way; 1 when not given")
    flag = parser.add_argument_group("settings of --dpm_solver").add_argument
    flag("--dpm_algorithm", choices=["dpmsolver++", "dpmsolver"], help="predict the image (++) or the noise")
    flag("--dpm_order", type=int, choices=[1, 2, 3], help="order of the solver; 2 when not given")
    flag("--dpm_method", choices=["multistep", "singlestep"], help="learn from steps before, or inside each step")
    flag("--dpm_spacing", choices=["time_uniform", "time_quadratic", "logSNR"], help="how steps lie in time")
    flag("--dpm_thresholding", action="store_true", default=None,
         help="dynamic thresholding, for models of pixels rather than latents")  # fmt: skip


# ---- the way through ---------------------------------------------------------------------------------------


def sample(options: argparse.Namespace, program: str, default_sampler: str = "ddim") -> None:
    """Check everything, load the model, draw, and write files; `options` come from `sampling_parser`.

    Raises:
        UserError: a flag, file or setting is wrong; flags are looked at first, the model is built last.
    """
    check_flags(options, default_sampler)
    check_paths(options, program)
    images = {}
    if hasattr(options, "init_img"):
        images["image"] = read_image(options.init_img)
    if hasattr(options, "mask"):
        images["mask"] = read_image(options.mask, "--mask")
    prompts = read_prompts(options)
    with one_line_warnings():
        model, protection = load(options, images)
        draw_and_save(options, model, protection, prompts, **images)


def load(options: argparse.Namespace, images: dict[str, Any]) -> tuple[Any, Any]:
    """The model that the flags name, on its device, and what its pictures must go through."""
    from ldm import checkpoint, hub, identify, loading, vae
    from ldm.inpainting import KnownRegion
    from ldm.util import load_yaml, pick_device

    if "mask" in images:
        KnownRegion.of(images["image"], images["mask"], options.H, options.W)
    device = pick_device(options.device)
    config = None if options.config == SD_CONFIG else load_yaml(options.config)
    if options.vae:
        vae.weights_file(options.vae, options.allow_pickle)
    ckpt = hub.find_checkpoint(options.ckpt)
    checkpoint.check_file(ckpt, options.allow_pickle)
    if config is None:
        config = identify.config_of(ckpt, otherwise=SD_CONFIG, allow_pickle=options.allow_pickle)
    model = loading.build_model(config)
    check_against_model(options, model)
    check_adapters(options, config)
    if hasattr(model.cond_stage_model, "check_files"):
        model.cond_stage_model.check_files()
    protection = protection_for(options, model, config, ckpt)
    model = loading.load_model(
        config,
        ckpt,
        device,
        adapter_path=options.adapter_path,
        adapter_scale=options.adapter_scale,
        artefacts=read_artefacts(options),
        allow_pickle=options.allow_pickle,
        model=model,
    )
    if options.vae:
        vae.load_vae(model, options.vae, options.allow_pickle)
    if options.compile:
        from ldm.compilation import compile_blocks

        compile_blocks(model.model.diffusion_model)
    return model, protection


def protection_for(options: argparse.Namespace, model: Any, config: Any, ckpt: Path) -> Any:
    """The `Protection` that a model calls for, as far as the flags leave it.

    Raises:
        UserError: the safety checker's weights are missing.
    """
    from ldm.safety import Protection

    checker = False if options.no_safety_checker else (options.safety_checker or True)
    return Protection.of(model, config, checker, watermark=not options.no_watermark, ckpt=ckpt)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Within the block, warnings for people are one line each on stderr, none of them twice."""
    with warnings.catch_warnings():
        show, said = warnings.showwarning, set()
        warnings.simplefilter("always", UserWarning)

        def in_one_line(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            line = f"warning: {' '.join(str(message).split())}"
            if category is not UserWarning:
                show(message, category, *rest)
            elif line not in said:
                said.add(line)
                print(line, file=sys.stderr)

        warnings.showwarning = in_one_line
        yield


def check_adapters(options: argparse.Namespace, config: Any) -> None:
    """Raise UserError when --adapter_path is no adapter directory, or --adapter nothing that `ldm.artefacts` knows."""
    from ldm.artefacts import look
    from ldm.loading import adapter_config_of
    from ldm.modules.adapter_files import MANIFEST, read_manifest

    for path in read_artefacts(options):
        look(path)
    if options.adapter_path and read_manifest(options.adapter_path) is None and not adapter_config_of(config):
        raise UserError(
            f"--adapter_path: '{options.adapter_path}' has no {MANIFEST}, so --config must be the yaml that "
            "the adapters were trained with (one with adapter_config)"
        )


def check_against_model(options: argparse.Namespace, model: Any) -> None:
    """Raise UserError when --H, --W, --C, --f or --ddim_steps do not go with the model."""
    from ldm.loading import Geometry

    geometry = Geometry.of(model)
    for name, value in (("C", geometry.channels), ("f", geometry.factor)):
        given = getattr(options, name)
        if given not in (None, value):
            raise UserError(f"--{name} {given}: this model has {value}; leave the flag out")
    geometry.check(options.H or geometry.height, options.W or geometry.width)
    if options.ddim_steps > model.num_timesteps:
        raise UserError(f"--ddim_steps {options.ddim_steps}: this model has {model.num_timesteps} timesteps")


def draw_and_save(
    options: argparse.Namespace, model: Any, protection: Any, prompts: Sequence[str], **images: Any
) -> list[Picture]:
    """All iterations, batch by batch; every batch is on disk before the next one begins."""
    from ldm import inference, outputs

    draw = {0: inference.txt2img, 1: inference.img2img, 2: inference.inpaint}[len(images)]
    folder = outputs.OutputFolder(Path(options.outdir))
    settings = drawing_settings(options, protection)
    total = len(prompts) * options.n_iter
    done: list[Picture] = []
    for iteration in range(options.n_iter):
        for first in range(0, len(prompts), options.n_samples):
            batch = prompts[first : first + options.n_samples]
            start = options.seed + (0 if options.fixed_code else iteration * len(prompts) + first)
            print(f"Pictures {len(done) + 1}-{len(done) + len(batch)} of {total}")
            among = (len(done), total)
            pictures = draw(model, *images.values(), batch, seed=start, among=among, **settings)
            if not done:
                say_if_too_small(pictures[0].image, protection)
            for picture in pictures:
                if picture.blocked:
                    print(f"The safety checker blocked the picture of seed {picture.settings.seed}; it is black.")
            if not options.skip_save:
                for picture in pictures:
                    folder.save(picture)
            done += pictures
    if not options.skip_grid:
        folder.save_grid(done, options.n_rows or options.n_samples, protection.mark)
    print(f"Your samples are ready and waiting for you here: {options.outdir}")
    return done


def drawing_settings(options: argparse.Namespace, protection: Any) -> dict[str, Any]:
    """The flags as arguments of the functions in ldm.inference."""
    same = ("sampler", "schedule", "solver", "scale", "negative_prompt", "precision", "prompt_weighting", "clip_skip")
    same += ("vae_tiling", "attention_slicing", "strength")
    return {
        **{name: getattr(options, name) for name in same if hasattr(options, name)},
        "steps": options.ddim_steps,
        "eta": options.ddim_eta if options.sampler == "ddim" else options.eta,
        "batch_size": options.n_samples,
        "exact": not options.batched,
        "protection": protection,
        "height": options.H,
        "width": options.W,
    }


def say_if_too_small(picture: Any, protection: Any) -> None:
    """Say that pictures of that size carry no watermark, when they should."""
    from ldm import watermark

    if protection.watermark and not watermark.fits(picture):
        print("These pictures are too small for the watermark (it needs 256x256); they carry none.")
