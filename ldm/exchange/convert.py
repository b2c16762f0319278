"""From any file of weights to any other: CompVis' .ckpt, .safetensors, diffusers' folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.artefacts import changed_weights
from ldm.checkpoint import KeyReport, check_numbers, for_inference, misshapen
from ldm.errors import UserError
from ldm.exchange import folder, text
from ldm.identify import config_of
from ldm.loading import adapter_config_of, build_model
from ldm.modules.adapters import is_adapter_key
from ldm.util import atomic_path, load_yaml
from ldm.weight_files import SUFFIXES, StateDict, in_precision, kind_of, read_state_dict, save_checkpoint, verify_hash

NOT_WRITTEN = (".bin", ".pt", ".pth", ".zip", ".onnx", ".gguf", ".yaml")


@dataclass(frozen=True)
class Conversion:
    """How weights are written.

    Args:
        dtype: float16, bfloat16 or float32; None keeps what the source has.
        ema: `average` takes averaged weights where there are any, `plain` the others, `both` keeps both sets
            (in one file, as in training).
        config: the model's yaml, needed only to make a folder of a file; what `config_of` finds when None.
        as_bin: .bin files in a folder instead of safetensors.
        artefacts: LoRA and files of weights that are added to the weights, and their strengths.
        allow_pickle: unpickle whatever the source holds, which may run any code.
    """

    dtype: torch.dtype | None = None
    ema: str = "average"
    config: Path | None = None
    as_bin: bool = False
    artefacts: Mapping[str, float] = field(default_factory=dict)
    allow_pickle: bool = False

    def __call__(self, source: Path, target: Path) -> Iterator[str]:
        """Read `source`, write `target`; the lines say what is worth knowing.

        Raises:
            UserError: the source cannot be read or does not fit its yaml, or the target cannot be written.
        """
        into_folder = check_target(target)
        from_folder = kind_of(source) == "diffusers"
        if source.resolve() == target.resolve():
            raise UserError(f"convert: '{source}' is both the source and the target")
        if self.ema == "both" and (into_folder or from_folder):
            raise UserError("convert: a diffusers folder has room for one set of weights; --keep_ema is for files")
        if self.artefacts and (self.ema == "both" or (from_folder and into_folder)):
            raise UserError("convert: --adapter goes with one set of weights in a file; make one of the folder first")
        if folder.verify_sums(source) if from_folder else verify_hash(source):
            yield f"{source}: the hashes kept with it agree"
        if from_folder and into_folder:
            folder.read_config(source)
            folder.rewrite_folder(source, target, self.dtype, self.as_bin, self.allow_pickle, self.ema == "average")
        elif from_folder:
            yield from self._folder_to_file(source, target)
        elif into_folder:
            yield from self._file_to_folder(source, target)
        else:
            state = self._read(source)
            if self.artefacts:
                state = self._with_artefacts(state, self._config_of(source, state))
            save_checkpoint(in_precision(state, self.dtype), target)

    def _config_of(self, source: Path, state: StateDict) -> DictConfig:
        return load_yaml(self.config) if self.config else config_of(source, state=state)

    def _with_artefacts(self, state: StateDict, config: DictConfig) -> StateDict:
        changed = changed_weights(state, config.model.params, self.artefacts)
        return {**state, **{key: value.to(state[key].dtype) for key, value in changed.items()}}

    def _read(self, source: Path) -> StateDict:
        state = read_state_dict(source, self.allow_pickle)
        if self.ema == "both":
            state = {k: v for k, v in state.items() if not k.startswith("loss.") and ".loss." not in k}
        else:
            state = for_inference(state, ema=self.ema == "average")
        check_numbers({k: v for k, v in state.items() if v.is_floating_point()}, str(source))
        return state

    def _folder_to_file(self, source: Path, target: Path) -> Iterator[str]:
        state, config = folder.read_folder(source, self.allow_pickle, self.ema == "average")
        check_numbers(state, str(source))
        yield from check_keys(state, config, source)
        state = self._with_artefacts(state, config)
        save_checkpoint(in_precision(state, self.dtype), target)
        yaml = target.with_suffix(".yaml")
        with atomic_path(yaml) as temporary:
            temporary.write_text(f"# The model in {target.name}.\n{OmegaConf.to_yaml(config)}", encoding="utf-8")
        yield f"{yaml}: the model's yaml, for --config"
        if (source / "safety_checker").is_dir():
            yield f"{source / 'safety_checker'} is not part of {target.name}; name it with --safety_checker"

    def _file_to_folder(self, source: Path, target: Path) -> Iterator[str]:
        state = self._read(source)
        config = self._config_of(source, state)
        section = config.model.params.get("cond_stage_config")
        if isinstance(section, DictConfig):
            state = text.with_unused(state, section, "cond_stage_model.")
        adapters = [key for key in state if is_adapter_key(key)]
        if adapters:
            yield f"adapters are left out, which diffusers does not have: {len(adapters)} tensors"
            state = {k: v for k, v in state.items() if k not in adapters}
        yield from check_keys(state, config, source)
        state = self._with_artefacts(state, config)
        unknown = folder.write_folder(state, config, target, self.dtype, self.as_bin)
        yield from KeyReport(unexpected=unknown).lines()


def check_target(target: Path) -> bool:
    """Whether a folder is to be written, from the target's name.

    Raises:
        UserError: it is the name of a kind of file that is not written.
    """
    if target.suffix in NOT_WRITTEN:
        raise UserError(f"convert: '{target}' must end in .safetensors or .ckpt, or be the name of a folder")
    return target.suffix not in SUFFIXES


def check_keys(state: StateDict, config: DictConfig, source: Path) -> list[str]:
    """Lines on weights that the yaml's model does not know.

    Raises:
        UserError: weights are missing or have other shapes.
    """
    if adapter_config_of(config) is not None:
        state = {k: v for k, v in state.items() if not is_adapter_key(k)}
    own = build_model(config).state_dict()
    report = KeyReport(
        missing=[k for k in own if k not in state],
        unexpected=[k for k in state if k not in own],
        misshapen=misshapen(state, own),
    ).notable()
    wrong = KeyReport(missing=report.missing, misshapen=report.misshapen).lines()
    if wrong:
        raise UserError(f"convert: '{source}' does not fit its yaml: {'; '.join(wrong[:4])}")
    return report.lines()
