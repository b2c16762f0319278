"""Write the yaml files of configs that differ little among each other, from tables and configs/templates."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Family:
    """Files of one template.

    Args:
        directory, template: where they are and what they are made of, below configs.
        members: a file's name without `.yaml` -> what it puts in place of the template's `$words`.
        shared: what all put there unless they say otherwise.
        alone: nothing else belongs into the directory.
    """

    directory: str
    template: str
    members: Mapping[str, Mapping[str, Any]]
    shared: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False

    def render(self) -> dict[str, str]:
        """Path below configs -> text of every file."""
        template = Template((CONFIGS / "templates" / f"{self.template}.yaml.in").read_text(encoding="utf-8"))
        return {
            f"{self.directory}/{name}.yaml": template.substitute({"name": name, **self.shared, **values})
            for name, values in self.members.items()
        }


# ---- adapters in Stable Diffusion v1 -----------------------------------------------------------------------

# Input position -> output positions of the transformer adapters; each has the hidden width 60.
TRANSFORMER = {
    "attn1i": ("attn1i", "attn2i", "ffni", "transo"),
    "attn1o": ("attn2i", "ffni", "transo"),
    "attn2i": ("attn2i", "ffni", "transo"),
    "attn2c": ("attn2c",),
    "attn2o": ("ffni", "transo"),
    "ffni": ("ffni", "transo"),
    "ffno": ("transo",),
    "transo": ("transo",),
}
# Input and output position -> hidden width of the residual adapters: about 3.3 million parameters each.
RESIDUAL = {("resi", "resi"): 6, ("resi", "reso"): 7, ("reso", "reso"): 9}

TRANSFORMER_ENTRY = Template("""\
          transformer_adp_config:
            - type: inout
              din: $din
              dout: $dout
              mid_dim: 60
              method: default
              scale: 1.0""")

RESIDUAL_ENTRY = Template("""\
          resblock_adp_config:
            type: inout
            din: $din
            dout: $dout
            method: default
            mid_dim: $mid_dim
            scale: 1.0""")


def _adapters() -> dict[str, dict[str, str]]:
    entries = {
        (din, dout): TRANSFORMER_ENTRY.substitute(din=din, dout=dout)
        for din, outputs in TRANSFORMER.items()
        for dout in outputs
    }
    for (din, dout), mid_dim in RESIDUAL.items():
        entries[din, dout] = RESIDUAL_ENTRY.substitute(din=din, dout=dout, mid_dim=mid_dim)
    return {f"{din}-{dout}": {"din": din, "dout": dout, "adapter": entry} for (din, dout), entry in entries.items()}


ADAPTERS = Family("sd-inject-dreambooth", "adapters", _adapters(), alone=True)

# ---- autoencoders ------------------------------------------------------------------------------------------

F4, F8, F16 = [1, 2, 4], [1, 2, 2, 4], [1, 1, 2, 2, 4]  # ch_mult: as many halvings as entries, less one

KL = Family(
    "autoencoder",
    "kl",
    {
        "autoencoder_kl_64x64x3": dict(factor=4, side=64, channels=3, ch_mult=F4, attention=[], batch_size=2),
        "autoencoder_kl_32x32x4": dict(factor=8, side=32, channels=4, ch_mult=[1, 2, 4, 4], attention=[]),
        "autoencoder_kl_16x16x16": dict(factor=16, side=16, channels=16, ch_mult=F16, attention=[16]),
        "autoencoder_kl_8x8x64": dict(factor=32, side=8, channels=64, ch_mult=[*F16, 4], attention=[16, 8]),
    },
    dict(batch_size=12),
)

_VQ_F4 = dict(factor=4, side=64, channels=3, entries=8192, ch_mult=F4, attention=[], batch_size=8)
_VQ_F8 = dict(factor=8, side=32, channels=4, entries=16384, ch_mult=F8, attention=[32], batch_size=10)
_VQ_F16 = dict(factor=16, side=16, channels=8, entries=16384, ch_mult=F16, attention=[16], batch_size=14)
VQ = Family(
    "autoencoder",
    "vq",
    {
        "vq-f4": _VQ_F4 | dict(disc_start=0),
        "vq-f4-noattn": _VQ_F4
        | dict(disc_start=11, attn_type="none", remark=" without attention, for pictures of any size"),
        "vq-f8": _VQ_F8 | dict(disc_layers=2, disc_start=1, disc_weight=0.6),
        "vq-f8-n256": _VQ_F8 | dict(entries=256),
        "vq-f16": _VQ_F16 | dict(disc_layers=2),
    },
    dict(remark="", attn_type="vanilla", disc_layers=3, disc_start=250001, disc_weight=0.75),
)

# ---- latent diffusion --------------------------------------------------------------------------------------

UNCONDITIONAL = Family(
    "latent-diffusion",
    "unconditional",
    {
        "celebahq-ldm-vq-4": dict(what="Faces of CelebA-HQ", folder="celeba256", data="celebahq"),
        "ffhq-ldm-vq-4": dict(what="Faces of FFHQ", folder="ffhq256", data="ffhq", batch_size=42),
        "lsun_bedrooms-ldm-vq-4": dict(what="Bedrooms of LSUN", folder="lsun_beds256", data="lsun_bedrooms"),
    },
    dict(batch_size=48),
)
SEMANTIC = Family(
    "latent-diffusion",
    "semantic_synthesis",
    {f"semantic_synthesis{pixels}": dict(pixels=pixels, side=pixels // 4) for pixels in (256, 512)},
)

# ---- Stable Diffusion v2 -----------------------------------------------------------------------------------

_BESIDE = "beside the latents the network sees the mask and the masked image's latents"
V2 = Family(
    "stable-diffusion",
    "v2",
    {
        "v2-inference": dict(what="Stable Diffusion v2-base, 512x512, which predicts the noise."),
        "v2-inference-v": dict(
            what="Stable Diffusion v2 and v2.1, 768x768, which predicts v. The original is told --H 768 --W 768.",
            predicts="v",
            side=96,
        ),
        "v2-inpainting-inference": dict(
            what=f"Stable Diffusion v2 for inpainting: {_BESIDE}.",
            target="LatentInpaintDiffusion",
            rate="5.0e-05",
            condition="hybrid",
            channels="9  # latents, mask, masked image's latents",
        ),
    },
    dict(target="LatentDiffusion", rate="1.0e-04", predicts="eps", side=64, condition="crossattn", channels=4),
)

# ---- immiscible diffusion ----------------------------------------------------------------------------------

_IMMISCIBLE = Template("""\
    noise_config:
      target: ldm.modules.noise.ImmiscibleNoise
      params: $params""")

# How noise meets images -> words for it, and its part of the yaml.
PAIRINGS = {
    "vanilla": dict(
        how="plain Gaussian noise, to compare with",
        noise="    # no noise_config: the files beside this one have it, and differ in nothing else",
    ),
    "assignment": dict(
        how="noise assigned to images over the whole batch",
        noise=_IMMISCIBLE.substitute(params="{method: assignment}"),
    ),
    "knn": dict(
        how="the nearest of 64 noises for every image, whatever the batch",
        noise=_IMMISCIBLE.substitute(params="{method: knn, k: 64}"),
    ),
}
# Li et al. (2024), "Immiscible Diffusion", the experiments with Stable Diffusion.
EXPERIMENTS = {
    "scratch": dict(
        what="Stable Diffusion v1.4's U-Net from scratch on ImageNet at 256x256",
        ignored="[model.diffusion_model., model_ema.]  # the U-Net starts from scratch",
        rate="1.0e-04",
        devices=8,
        batch_size=256,
        steps=20000,
    ),
    "finetune": dict(
        what="Stable Diffusion v1.4 fine-tuned on ImageNet at 256x256",
        ignored="[]",
        rate="1.0e-05",
        devices=4,
        batch_size=128,
        steps=5000,
    ),
}
IMMISCIBLE = Family(
    "immiscible",
    "immiscible",
    {
        f"{experiment}-{pairing}": values | words | {"batch": values["devices"] * values["batch_size"]}
        for experiment, values in EXPERIMENTS.items()
        for pairing, words in PAIRINGS.items()
    },
)
IMMISCIBLE_TINY = Family(
    "immiscible", "immiscible_tiny", {f"tiny-{pairing}": words for pairing, words in PAIRINGS.items()}
)

# ---- k-diffusion -------------------------------------------------------------------------------------------

_ORIGIN = "null                 # a checkpoint of {}; null starts from nothing"
_GROW = " model.params.grow_from=logs/RUN/checkpoints/last.ckpt"
_FOLDER = dict(
    rate="1.0e-4", power=0.0, depths=[4] * 5, widths=[128, 128, 256, 256, 256],
    attention="[false, false, false, true, true]", data="ldm.data.captioned.CaptionedFolder",
    images='data_root: data/images, caption: ""',
)  # fmt: skip
_TORCHVISION = "ldm.data.tables.TorchvisionImages"
KARRAS = Family(
    "karras",
    "karras",
    {
        "mnist": dict(
            what="MNIST from disk, 28x28.", rate="2.0e-4", size=28, channels=1, sigma_data=0.6162,
            widths=[128, 128, 256], attention="[false, false, true]",
            data=_TORCHVISION, images="name: MNIST, data_root: data", steps=100000,
        ),
        "cifar10": dict(
            what="CIFAR-10 from disk, 32x32.", size=32, data=_TORCHVISION, images="name: CIFAR10, data_root: data"
        ),
        "butterflies": dict(
            what="A Hugging Face data set without captions, 32x32.", size=32, data="ldm.data.tables.HuggingFaceImages",
            images='path: huggan/smithsonian_butterflies_subset, caption: ""', steps=100000,
        ),
        "images-64": _FOLDER | dict(
            what="A folder of images, 64x64; the outermost level is there but unused: images-128.yaml grows into it.",
            words=" data.params.train.params.data_root=FOLDER", size=64, skipped=1,
        ),
        "images-128": _FOLDER | dict(
            what="The images of images-64.yaml at 128x128: its network, with the outermost level in use.",
            words=_GROW, size=128, grow=_ORIGIN.format("images-64.yaml"),
            batch_size=16, steps=200000,
        ),
    },
    dict(
        words="", rate="1.0e-4", channels=3, grow="null", sigma_data=0.5, power=1.0, depths=[2, 4, 4],
        widths=[128, 256, 512], attention="[false, true, true]", skipped=0, batch_size=64, steps=400000,
    ),
)  # fmt: skip
KARRAS_PHOTOS = Family(
    "karras",
    "karras_photos",
    {
        "photos-32": dict(
            size=32, words="", remark="", grow="null", batch_size=16, steps=2500,
            depths=[1, 2], widths=[64, 128], attention="[false, true]",
        ),
        "photos-64": dict(
            size=64, words=_GROW, remark=", grown",
            grow=_ORIGIN.format("photos-32.yaml"), batch_size=8,
            depths=[1, 1, 2], widths=[64, 64, 128], attention="[false, false, true]", steps=1000,
        ),
    },
)  # fmt: skip


# ---- BK-SDM ------------------------------------------------------------------------------------------------

BKSDM = Family(
    "distill",
    "bksdm",
    {
        "sd-small": dict(
            what="one residual block a level less (sd_small)",
            parameters="579,384,964",
            blocks="        channel_mult: [1, 2, 4, 4]",
        ),
        "sd-tiny": dict(
            what="one residual block a level less, and neither its deepest level nor the middle (sd_tiny)",
            parameters="323,384,964",
            blocks="        channel_mult: [1, 2, 4]  # v1: [1, 2, 4, 4]\n        use_middle_block: false",
        ),
    },
)
_TINY_CUTS = {
    "tiny-small": dict(what="without the deepest level", parameters="4,283,012", middle="true"),
    "tiny-tiny": dict(
        what="without the deepest level and the middle", parameters="3,262,724", middle="false  # the tiny model: true"
    ),
}
_TAUGHT = dict(weight="1.0", how="cut out of it and taught by it")
_UNTAUGHT = dict(weight="0.0", how="cut out of it and trained without it: what the file beside this one is measured by")
BKSDM_TINY = Family(
    "distill",
    "bksdm_tiny",
    {
        f"{name}{ending}": cut | way
        for name, cut in _TINY_CUTS.items()
        for ending, way in (("", _TAUGHT), ("-untaught", _UNTAUGHT))
    },
)


# ---- ways to personalise ------------------------------------------------------------------------------------

_WORD = """    personalization_config:         # the new word: --placeholder_string and --init_word say otherwise
      target: ldm.modules.embedding_manager.EmbeddingManager
      params: {placeholder_strings: ["<sks>"], num_vectors_per_token: $vectors}
"""
_LORA = "    lora_config: {rank: $rank, alpha: $rank, targets: $targets$more}\n"
_ALL_LAYERS = "[to_q, to_k, to_v, to_out.0, proj_in, proj_out, ff.net.0.proj, ff.net.2]"
_TEXT_LAYERS = ", text_targets: [q_proj, k_proj, v_proj, out_proj]"


def _lora(rank: int, more: str = "", targets: str = _ALL_LAYERS) -> str:
    return Template(_LORA).substitute(rank=rank, more=more, targets=targets)


def _word(vectors: int) -> str:
    return Template(_WORD).substitute(vectors=vectors)


def _factors(**levels: float) -> str:
    return f"    lr_factors: {{{', '.join(f'{level}: {factor}' for level, factor in levels.items())}}}\n"


_WAYS = {
    "lora": dict(what="LoRA in the U-Net", levels="[lora]"),
    "lora-text": dict(what="LoRA in the U-Net and in the text encoder", levels="[lora]"),
    "embedding": dict(what="textual inversion, a new word", levels="[embeder]"),
    "pivotal": dict(what="a new word and LoRA in the U-Net", levels="[embeder, lora]"),
    "unet": dict(what="the whole U-Net", levels="[unet]"),
    "unet-text": dict(what="the whole U-Net and the text encoder", levels="[unet, text]"),
}
# Learning rate, settings and steps of each, for Stable Diffusion v1 and for the tiny model.
_SD = {
    "lora": dict(rate="1.0e-4", settings=_lora(16), steps=1000),
    "lora-text": dict(rate="1.0e-4", settings=_lora(16, _TEXT_LAYERS), steps=1000),
    "embedding": dict(rate="5.0e-4", settings=_word(4), steps=3000),
    "pivotal": dict(rate="1.0e-4", settings=_lora(16) + _word(2) + _factors(embeder=5.0), steps=1000),
    "unet": dict(rate="5.0e-6", settings="", steps=800),
    "unet-text": dict(rate="2.0e-6", settings="", steps=800),
}
_TINY = {
    "lora": dict(rate="4.0e-3", settings=_lora(8)),
    "lora-text": dict(rate="2.0e-3", settings=_lora(8, _TEXT_LAYERS)),
    "embedding": dict(rate="5.0e-2", settings=_word(4)),
    "pivotal": dict(rate="5.0e-3", settings=_lora(8) + _word(2) + _factors(embeder=5.0)),
    "unet": dict(rate="6.0e-4", settings=""),
    "unet-text": dict(rate="3.0e-4", settings=""),
}
PERSONALIZE = Family("personalize", "personalize", {name: way | _SD[name] for name, way in _WAYS.items()})
PERSONALIZE_TINY = Family(
    "personalize",
    "personalize_tiny",
    {f"tiny-{name}": way | _TINY[name] for name, way in _WAYS.items()},
    dict(steps=150),
)

FAMILIES = (
    ADAPTERS, KL, VQ, UNCONDITIONAL, SEMANTIC, V2, IMMISCIBLE, IMMISCIBLE_TINY, KARRAS, KARRAS_PHOTOS,
    BKSDM, BKSDM_TINY, PERSONALIZE, PERSONALIZE_TINY,
)  # fmt: skip


def render_all() -> dict[str, str]:
    """Path below configs -> text of every file."""
    return {path: text for family in FAMILIES for path, text in family.render().items()}


def stale_files(configs: Path) -> list[str]:
    """Paths below `configs` that are not, or not any more, what the tables say."""
    wanted = render_all()
    alone = [file for family in FAMILIES if family.alone for file in (configs / family.directory).glob("*.yaml")]
    names = wanted.keys() | {file.relative_to(configs).as_posix() for file in alone}
    there = {name: (configs / name).read_text(encoding="utf-8") for name in names if (configs / name).is_file()}
    return sorted(name for name in names if wanted.get(name) != there.get(name))


def write_all(configs: Path) -> None:
    """Write every file that is not current; one that the tables should know and do not is an error."""
    from ldm.util import atomic_path

    wanted = render_all()
    for name in stale_files(configs):
        if name not in wanted:
            raise UserError(f"{configs / name} is not in the table; delete it or add it to the table")
        with atomic_path(configs / name) as temporary:
            temporary.write_text(wanted[name], encoding="utf-8")
        print(f"wrote {configs / name}")


def main(argv: Sequence[str]) -> None:
    """Write the files, or with --check only say whether they are current."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--outdir", type=Path, default=CONFIGS, help="folder with the folders of yaml files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is not current")
    options = parser.parse_args(argv)
    if not options.check:
        write_all(options.outdir)
    elif stale := stale_files(options.outdir):
        raise UserError(f"{options.outdir}: not current: {', '.join(stale)}; run scripts/render_configs.py")


if __name__ == "__main__":
    cli.run(main)
