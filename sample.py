"""Draw pictures with a model and adapters that were tuned on photos, by DPM-Solver++ unless told otherwise.

Example: python sample.py --prompt "a photo of a sks dog" --adapter_path logs/RUN/checkpoints/3000-adapters
"""

from __future__ import annotations

from collections.abc import Sequence

from ldm import cli, cli_sampling


def main(argv: Sequence[str]) -> None:
    """Parse the flags and draw."""
    parser = cli_sampling.sampling_parser(
        "Draw with a model and adapters, by DPM-Solver++ (DDIM with --ddim_eta above 0, PLMS with --plms).",
        outdir="outputs/txt2img-samples",
        n_samples=1,
        n_iter=2,
        scale=7.5,
    )
    options = parser.parse_args(argv)
    cli_sampling.sample(options, "sample.py", default_sampler="ddim" if options.ddim_eta else "dpm_solver")


if __name__ == "__main__":
    cli.run(main)
