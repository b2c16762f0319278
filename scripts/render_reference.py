"""Write the manual's reference of the yaml files, docs/yaml.md, from signatures and docstrings."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "yaml.md"
MARK = "<!-- What follows is written by scripts/render_reference.py. -->\n"

# Heading -> the classes that a `target:` may name there. What they share follows them.
TARGETS: dict[str, tuple[str, ...]] = {
    "Diffusion models": (
        "ldm.models.diffusion.ddpm.LatentDiffusion",
        "ldm.models.diffusion.ddpm_dream.LatentDiffusion",
        "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
        "ldm.models.diffusion.ddpm.DDPM",
        "ldm.k_diffusion.training.KarrasDiffusion",
        "ldm.distillation.bksdm.DistilledDiffusion",
        "ldm.distillation.flash.FlashDiffusion",
        "ldm.models.diffusion.trainer.DiffusionTrainer",
        "ldm.modules.ema.InverseWarmUp",
        "ldm.distillation.start.Phase",
        "ldm.modules.lora.LoraConfig",
    ),
    "Autoencoders": (
        "ldm.models.autoencoder.AutoencoderKL",
        "ldm.models.autoencoder.VQModel",
        "ldm.models.autoencoder.VQModelInterface",
        "ldm.models.autoencoder.IdentityFirstStage",
        "ldm.models.autoencoder_base.Autoencoder",
        "ldm.modules.diffusionmodules.model.Encoder",
    ),
    "Losses of autoencoders": (
        "ldm.modules.losses.LPIPSWithDiscriminator",
        "ldm.modules.losses.VQLPIPSWithDiscriminator",
        "ldm.modules.losses.contperceptual.DummyLoss",
        "ldm.modules.losses.adversarial.AdversarialLoss",
    ),
    "Networks": (
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "ldm.modules.diffusionmodules.openaimodel_inject.UNetModel_inject",
        "ldm.k_diffusion.models.image_v1.ImageDenoiserModelV1",
    ),
    "Conditions": (
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "ldm.modules.encoders.modules.BERTEmbedder",
        "ldm.modules.encoders.modules.ClassEmbedder",
        "ldm.modules.encoders.modules.SpatialRescaler",
        "ldm.modules.embedding_manager.EmbeddingManager",
    ),
    "Noise": (
        "ldm.modules.noise.GaussianNoise",
        "ldm.modules.noise.ImmiscibleNoise",
    ),
    "Densities of noise levels": (
        "ldm.k_diffusion.densities.LogNormal",
        "ldm.k_diffusion.densities.SplitLogNormal",
        "ldm.k_diffusion.densities.LogLogistic",
        "ldm.k_diffusion.densities.LogUniform",
        "ldm.k_diffusion.densities.VDiffusion",
        "ldm.k_diffusion.densities.CosineInterpolated",
    ),
    "Learning rates": (
        "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
        "ldm.lr_scheduler.LambdaLinearScheduler",
        "ldm.lr_scheduler.LambdaWarmUpCosineScheduler2",
        "ldm.lr_scheduler.LambdaInverseScheduler",
        "ldm.lr_scheduler.LambdaExponentialScheduler",
    ),
    "Data modules": (
        "main.DataModuleFromConfig",
        "main_dream_booth.DataModuleFromConfig",
    ),
    "Data sets": (
        "ldm.data.captioned.CaptionedFolder",
        "ldm.data.captioned.ClassFolders",
        "ldm.data.shards.Shards",
        "ldm.data.tables.HuggingFaceImages",
        "ldm.data.tables.TorchvisionImages",
        "ldm.data.tables.Rows",
        "ldm.data.captioned.CaptionedImages",
        "ldm.data.base.Framing",
        "ldm.data.buckets.Buckets",
        "ldm.data.personalized_dream.PersonalizedBase",
        "ldm.data.shapes.ShapesDataset",
        "ldm.data.at_hand.Digits",
        "ldm.data.at_hand.PhotoCrops",
    ),
    "Callbacks": (
        "main.ImageLogger",
        "ldm.k_diffusion.quality.DistanceLogger",
        "ldm.k_diffusion.gradient_noise.GradientNoiseLogger",
        "ldm.distillation.pictures.LoraFile",
        "ldm.k_diffusion.pixels.PixelSampler",
    ),
}
# Of these, what is no target, but holds parameters that targets take.
PARTS = frozenset(
    "DiffusionTrainer InverseWarmUp Phase LoraConfig Autoencoder Encoder AdversarialLoss Rows CaptionedImages Framing "
    "Buckets PixelSampler".split()
)


@dataclass(frozen=True)
class Parameter:
    """What a `params:` section may hold."""

    name: str
    kind: str  # its annotation, "" for none
    default: str | None  # as Python writes it; None: it must be given
    says: str = ""
    place: int = 0  # of the explanation in its docstring


@dataclass
class Target:
    """A class as its source describes it.

    Args:
        name: how yaml files name it.
        base: the class whose parameters it takes too, as it is named in `TARGETS`, or None.
    """

    name: str
    summary: str
    parameters: list[Parameter] = field(default_factory=list)
    base: str | None = None

    @property
    def last(self) -> str:
        """The class's own name."""
        return self.name.rpartition(".")[2]

    @property
    def title(self) -> str:
        """Its heading; two classes of one name say whose they are."""
        twice = sum(name.endswith(f".{self.last}") for names in TARGETS.values() for name in names) > 1
        return f"{self.last} of {self.name.split('.')[-2]}" if twice else self.last

    @property
    def anchor(self) -> str:
        """The end of links to it."""
        return "#" + self.title.lower().replace(" ", "-")


# ---- reading sources ------------------------------------------------------------------------------------------


@functools.cache
def body_of(module: str) -> list[ast.stmt]:
    """The statements of a module of the repository."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")).body


def find(name: str) -> tuple[str, ast.ClassDef]:
    """(module, class) of a dotted name, wherever it is imported from.

    Raises:
        UserError: there is no such class.
    """
    module, _, last = name.rpartition(".")
    for node in body_of(module):
        if isinstance(node, ast.ClassDef) and node.name == last:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == last:
                    return find(f"{node.module}.{alias.name}")
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY":
            places = ast.literal_eval(node.value)
            if last in places:
                return find(f"{places[last]}.{last}")
    raise UserError(f"TARGETS: there is no class '{name}'")


def bases_of(module: str, node: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
    """(module, class) of the classes of the repository that a class is made from, the nearest first."""
    found = []
    for written in map(ast.unparse, node.bases):
        first, *rest = written.split(".")
        for other in body_of(module):
            if isinstance(other, ast.ClassDef) and other.name == first:
                found.append((module, other))
            if isinstance(other, ast.ImportFrom) and other.module.startswith("ldm"):
                names = [alias.name for alias in other.names if (alias.asname or alias.name) == first]
                found += [find(".".join([other.module, name, *rest])) for name in names]
    return found + [further for base in found for further in bases_of(*base)]


def signature(node: ast.ClassDef) -> tuple[list[Parameter], bool]:
    """A class's own parameters, and whether it hands others on to its base."""
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        fields = [s for s in node.body if isinstance(s, ast.AnnAssign) and "ClassVar" not in ast.unparse(s.annotation)]
        return [
            Parameter(s.target.id, ast.unparse(s.annotation), ast.unparse(s.value) if s.value else None) for s in fields
        ], False
    init = next((s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None)
    if init is None:
        return [], True
    given = init.args
    usual = given.posonlyargs + given.args
    defaults = [None] * (len(usual) - len(given.defaults)) + given.defaults
    pairs = [*zip(usual, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)][1:]
    found = [
        Parameter(
            a.arg, ast.unparse(a.annotation) if a.annotation else "", None if default is None else ast.unparse(default)
        )
        for a, default in pairs
    ]
    return found, given.kwarg is not None


def explained(doc: str, names: Sequence[str]) -> dict[str, str]:
    """What a docstring's `Args` say of each parameter: `a: text.`, also `a, b: text. c: text.` in one line."""
    section = re.search(r"^Args.*?:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    if not section or not names:
        return {}
    entries = re.sub(r"\n {8,}", " ", section[1])
    name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    heads = list(re.finditer(rf"(?:^ +|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ", entries, re.MULTILINE))
    texts = {}
    for head, following in zip_longest(heads, heads[1:]):
        text = entries[head.end() : following.start() if following else None].split("\n")[0].strip().rstrip(".;")
        texts |= dict.fromkeys(head[1].split(", "), text)
    return texts


def describe(name: str) -> Target:
    """A target as its source describes it.

    A parameter that its `Args` do not explain is explained by another's text, a base's, or the text above them.

    Raises:
        UserError: something is explained nowhere.
    """
    module, node = find(name)
    parameters, hands_on = signature(node)
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    body = re.split(r"^(?:Args|Raises).*?:$", doc, maxsplit=1, flags=re.MULTILINE)[0].strip()
    says = explained(doc, [p.name for p in parameters])
    for parameter in parameters:
        if parameter.name not in says and (others := [o for o, text in says.items() if f"`{parameter.name}`" in text]):
            says[parameter.name] = f"see `{others[0]}`"
    for key, text in says.items():
        if seen := re.fullmatch(r"see `(\w+)`", text):
            says[key] = explanation(module, seen[1], key) or text
    bases = bases_of(module, node)
    for base in bases:
        theirs = explained(inspect.cleandoc(ast.get_docstring(base[1]) or ""), [p.name for p in parameters])
        says |= {key: text for key, text in theirs.items() if key not in says}
    silent = [p.name for p in parameters if p.name not in says]
    first, *paragraphs = body.split("\n\n")
    told = [text for text in paragraphs if any(f"`{p}" in text for p in silent)]
    summary = [" ".join(text.split()) for text in (first, *told)]
    lacking = [p for p in silent if not any(f"`{p}" in text for text in summary)]
    if lacking:
        raise UserError(f"{name}: its docstring's Args lack {', '.join(lacking)}")
    shown = {(found[0], found[1].name): name for name, found in _found().items()}
    base = next((shown[key] for m, n in bases if hands_on and (key := (m, n.name)) in shown), None)
    order = list(says)
    known = [replace(p, says=says[p.name], place=order.index(p.name)) if p.name in says else p for p in parameters]
    return Target(name, "\n\n".join(summary), known, base)


def explanation(module: str, name: str, parameter: str) -> str | None:
    """What a class that a module names says of a parameter, if it says something."""
    try:
        _, node = find(f"{module}.{name}")
    except UserError:
        return None
    return explained(inspect.cleandoc(ast.get_docstring(node) or ""), [p.name for p in signature(node)[0]]).get(
        parameter
    )


@functools.cache
def _found() -> dict[str, tuple[str, ast.ClassDef]]:
    return {name: find(name) for names in TARGETS.values() for name in names}


# ---- writing ----------------------------------------------------------------------------------------------------

# Annotations -> the words of yaml.
WORDS = {
    "Any": "section", "Mapping[str, Any]": "section", "dict": "section", "str": "text", "int": "whole number",
    "float": "number", "bool": "true or false", "os.PathLike[str]": "", "None": "",
}  # fmt: skip


def kind_in_words(annotation: str) -> str:
    """A parameter's type as yaml has it: `Sequence[int] | None` is a list of whole numbers."""
    words = []
    for part in re.split(r" \| (?![^\[]*\])", annotation):
        inner = re.fullmatch(r"(?:Sequence|list|tuple)\[(.*?)(?:, \.\.\.)?\]", part)
        if inner:
            words.append("list")
        elif part.startswith(("Mapping", "dict")):
            words.append("section")
        else:
            words.append(WORDS.get(part, part))
    return " or ".join(dict.fromkeys(filter(None, words)))


def default_in_yaml(default: str | None) -> str:
    """A default as yaml writes it; what must be given has none."""
    if default is None:
        return "required"
    try:
        value = ast.literal_eval(default)
    except ValueError:  # a name
        return ""
    if value is None or isinstance(value, bool | str):
        return f"`{json.dumps(value)}`" if not value or not isinstance(value, str) else f"`{value}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def in_yaml_words(text: str, targets: dict[str, Target]) -> str:
    """A docstring's words for readers of yaml: its constants, and links to what is on the page."""
    words = {"None": "`null`", "True": "`true`", "False": "`false`"}
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\b(None|True|False)\b", lambda m: words[m[1]], parts[i])
    text = "`".join(parts)
    shown = {name: t for t in targets.values() for name in (t.last, t.name) if t.title == t.last}
    return re.sub(r"`([\w.]+)`", lambda m: f"[{m[0]}]({shown[m[1]].anchor})" if m[1] in shown else m[0], text)


def rows(target: Target) -> list[list[Parameter]]:
    """Its parameters in the order of the explanations; those that share one together."""
    explained_ones = sorted((p for p in target.parameters if p.says), key=lambda p: p.place)
    texts = dict.fromkeys(p.says for p in explained_ones)
    return [[p for p in explained_ones if p.says == says] for says in texts] + [
        [p] for p in target.parameters if not p.says
    ]


def render_target(target: Target, targets: dict[str, Target]) -> str:
    """One class: its name, what it is, a table of its parameters."""
    kind = "Part of others" if target.last in PARTS else "Target"
    lines = [f"### {target.title}", "", f"{kind}: `{target.name}`", "", in_yaml_words(target.summary, targets)]
    if target.parameters:
        lines += ["", "| parameter | type | default | meaning |", "|---|---|---|---|"]
    for group in rows(target):
        cells = (
            ", ".join(f"`{p.name}`" for p in group),
            ", ".join(dict.fromkeys(kind_in_words(p.kind) for p in group)),
            ", ".join(dict.fromkeys(default_in_yaml(p.default) for p in group)),
            in_yaml_words(group[0].says, targets),
        )
        lines.append(f"| {' | '.join(cells)} |")
    if target.base:
        base = targets[target.base]
        lines += ["", f"{'Also' if target.parameters else 'It'} takes the parameters of [{base.title}]({base.anchor})."]
    return "\n".join(lines)


def render() -> str:
    """The part of the page below `MARK`."""
    targets = {name: describe(name) for names in TARGETS.values() for name in names}
    sections = []
    for heading, names in TARGETS.items():
        sections += [f"## {heading}", *(render_target(targets[name], targets) for name in names)]
    return "\n\n".join(sections) + "\n"


def render_page(page: str) -> str:
    """The page with what follows `MARK` written anew.

    Raises:
        UserError: the page has no such line.
    """
    head, mark, _ = page.partition(MARK)
    if not mark:
        raise UserError(f"{PAGE}: the line '{MARK.strip()}' is missing")
    return head + mark + "\n" + render()


def main(argv: Sequence[str]) -> None:
    """Write the page, or with --check only say whether it is current."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is not current")
    options = parser.parse_args(argv)
    if not options.page.is_file():
        raise UserError(f"--page: there is no file '{options.page}'")
    page = options.page.read_text(encoding="utf-8")
    wanted = render_page(page)
    if page == wanted:
        return
    if options.check:
        raise UserError(f"{options.page}: not current; run scripts/render_reference.py")
    from ldm.util import atomic_path

    with atomic_path(options.page) as temporary:
        temporary.write_text(wanted, encoding="utf-8")
    print(f"wrote {options.page}")


if __name__ == "__main__":
    cli.run(main)
