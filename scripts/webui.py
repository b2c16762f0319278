"""Draw, change and teach in the browser: text to image, image to image, inpainting, training, and a gallery.

python scripts/webui.py                                                the small model that comes along
python scripts/webui.py --config configs/stable-diffusion/v1-inference.yaml --ckpt sd-v1-4.ckpt \\
    --train_base configs/sd-inject-dreambooth/attn2o-ffni.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli, cli_sampling
from ldm.cli_checks import check_paths, check_seed_and_checker
from ldm.errors import UserError

CONFIG, CKPT = "models/tiny/config.yaml", "models/tiny/model.safetensors"
# What loading a model looks at and the page asks for later.
NOT_HERE = dict(H=None, W=None, C=None, f=None, ddim_steps=1, lora=None, adapter_path=None, adapter_scale=1.0,
                from_file=None, seed=0, schedule=None, sampler_flags=[], compile=False)  # fmt: skip
LOOPBACK = ("127.0.0.1", "localhost", "::1")
AT_LEAST_ONE = ("max_steps", "max_pictures", "max_queue", "max_train_steps", "max_upload")


def parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(description="A web page to draw with a model, and to teach it new things.")
    flag = parser.add_argument
    flag("--config", default=CONFIG, help="yaml of the model")
    flag("--ckpt", default=CKPT, help="its weights: a file, a diffusers folder, or a model hub's owner/name")
    flag("--vae", help="another autoencoder's weights")
    flag("--adapters", action="append", metavar="PATH",
         help="an adapter directory, a LoRA file, or a folder of such, to choose from; may be repeated")  # fmt: skip
    flag("--train_base", help="yaml of DreamBooth trainings of this model (default: the small model's)")
    flag("--outdir", default="outputs/webui", help="the only folder in which anything is written")
    cli_sampling.add_model_flags(flag)
    flag = parser.add_argument_group("the page").add_argument
    flag("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 for all of this machine's: give --auth too")
    flag("--port", type=int, default=7860, help="port to serve at")
    flag("--auth", metavar="USER:PASSWORD", help="ask for these first")
    flag("--open", action="store_true", help="open it in the browser")
    flag = parser.add_argument_group("limits").add_argument
    flag("--max_size", type=int, help="pixels a side (default: twice the model's)")
    flag("--max_steps", type=int, default=150, help="steps of a sampler")
    flag("--max_pictures", type=int, default=16, help="pictures of one job")
    flag("--max_queue", type=int, default=20, help="jobs that wait")
    flag("--max_train_steps", type=int, default=5000, help="steps of one training")
    flag("--max_upload", type=int, default=20, help="MiB of one uploaded file")
    flag("--max_folder", type=float, default=20.0, help="GiB of --outdir, above which nothing new is begun")
    parser.set_defaults(**NOT_HERE)
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags and files that cannot be; needs no torch."""
    for name in AT_LEAST_ONE:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.max_size is not None and options.max_size < 8:
        raise UserError(f"--max_size {options.max_size}: must be at least 8")
    if not options.max_folder > 0:
        raise UserError(f"--max_folder {options.max_folder:g}: must be above 0")
    if not 0 < options.port < 65536:
        raise UserError(f"--port {options.port}: must be between 1 and 65535")
    if options.auth is not None and not all(options.auth.partition(":")):
        raise UserError("--auth: must be of the form USER:PASSWORD")
    if not options.outdir:
        raise UserError("--outdir: needs a value")
    check_seed_and_checker(options)
    for path in options.adapters or ():
        if not Path(path).exists():
            raise UserError(f"--adapters: there is nothing at '{path}'")
    if options.train_base and not Path(options.train_base).is_file():
        raise UserError(f"--train_base: there is no file '{options.train_base}'")
    check_paths(options, "scripts/webui.py")


def main(argv: Sequence[str]) -> None:
    """Parse the flags and serve."""
    options = parser().parse_args(argv)
    check(options)
    if options.host not in LOOPBACK and not options.auth:
        print(f"warning: whoever reaches {options.host} can use the page; give --auth USER:PASSWORD", file=sys.stderr)
    from ldm.web.serve import serve

    with cli_sampling.one_line_warnings():
        serve(options)


if __name__ == "__main__":
    cli.run(main)
