"""The U-Net with adapters, as the yaml files of `configs/sd-inject-dreambooth` name it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.modules.adapters import inject
from ldm.modules.diffusionmodules.openaimodel import UNetModel


class UNetModel_inject(UNetModel):
    """`UNetModel` with adapters (see `ldm.modules.adapters`).

    Args:
        adapter_config: transformer_adp_config, resblock_adp_config or both, each one adapter or a list of them.
    """

    def __init__(self, *args: Any, adapter_config: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inject(self, adapter_config)
