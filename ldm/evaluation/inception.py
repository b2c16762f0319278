"""The Inception network by which FID is measured everywhere, from torchvision's layers and the published weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ldm.util import UserError

# The weights of the original FID, ported from TensorFlow: pytorch-fid's and torch-fidelity's file.
FILE = "pt_inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
MEANS = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
GREATEST = ("Mixed_7c",)


class InceptionFeatures(nn.Module):
    """Pictures [B, 3, 299, 299] in [-1, 1] -> the 2048 numbers of the last pooling layer (Heusel et al., 2017).

    In the original network the pooling branches differ from torchvision's: means leave the padding out of their
    count, and the last block's is a maximum.
    """

    size, dimensions = 299, 2048

    def __init__(self) -> None:
        from torchvision.models.inception import Inception3

        super().__init__()
        self.net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        self.net.fc, self.net.dropout = nn.Identity(), nn.Identity()
        for name in MEANS:
            _pool(self.net.get_submodule(name), lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        for name in GREATEST:
            _pool(self.net.get_submodule(name), lambda x: F.max_pool2d(x, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


def _pool(block: nn.Module, pool: object) -> None:
    """Let a block's pooling branch see `pool` of the block's input."""
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.branch_pool.register_forward_pre_hook(lambda module, inputs: (pool(seen.pop()),))


def find(path: str | None = None) -> Path | None:
    """The file of weights: the one named, or that in torch's cache, where pytorch-fid keeps it as well; else None."""
    candidate = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / FILE
    return candidate if candidate.is_file() else None


def load(path: str | None = None) -> InceptionFeatures:
    """The network with its weights, which are downloaded into torch's cache when they are nowhere.

    Raises:
        UserError: they cannot be had, or are of something else.
    """
    from ldm.checkpoint import apply_state_dict, read_state_dict

    file = find(path)
    if path and file is None:
        raise UserError(f"--inception: there is no file '{path}'")
    if file is None:
        file = Path(torch.hub.get_dir()) / "checkpoints" / FILE
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(ADDRESS, str(file), hash_prefix="6726825d")
        except Exception as error:  # the network's errors are of many types
            raise UserError(
                f"--features inception: the weights cannot be downloaded ({' '.join(str(error).split())[:100]}); put "
                f"{ADDRESS} at {file}, or name the file with --inception"
            ) from error
    features = InceptionFeatures()
    report = apply_state_dict(features.net, read_state_dict(file), str(file))
    missing = [key for key in report.missing if not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(f"--inception: '{file}' lacks {len(missing)} weights of FID's Inception, such as {missing[0]}")
    return features.eval().requires_grad_(False)
