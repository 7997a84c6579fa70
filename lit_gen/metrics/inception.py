"""The Inception network of 2015-12-05, on whose 2048 features the published FID stands
(https://arxiv.org/abs/1706.08500).

The graph is torch-fidelity's; here its 94 convolutions are folded with their batch norms and run
channels-last, which gives the same features to 1e-5 at 1.5 times the speed. Two resizes to 299: TF1's (`fid`)
and PIL's bicubic (`fid_clean`).
"""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lit_gen.errors import ConfigError
from lit_gen.metrics.extractors import INCEPTION_2015, Extractor, ExtractorId
from lit_gen.metrics.weights_files import Published, find_weights

__all__ = ["inception2015", "inception2015_clean", "resize_pil_bicubic", "resize_tf1"]

SIZE = 299
WEIGHTS = Published(
    what="the Inception weights of 2015-12-05",
    files=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    sha256_prefix=INCEPTION_2015[1],
    size="96 MB",
)


def inception2015(weights: str | Path | None = None) -> Extractor:
    """The extractor of FID as TTUR, EDM, ADM and torch-fidelity report it; raises `ConfigError` if the
    weights could not be found or downloaded.

    Features (B, 2048) of the last pool; logits (B, 1008) without bias, as the Inception Score takes them.
    """
    return _extractor(weights, "tf1", resize_tf1)


def inception2015_clean(weights: str | Path | None = None) -> Extractor:
    """The extractor of clean-fid's FID: the same network after PIL's antialiased bicubic.
    https://arxiv.org/abs/2104.11222
    """
    return _extractor(weights, "clean", resize_pil_bicubic)


def resize_tf1(x: Tensor, size: int = SIZE) -> Tensor:
    """TensorFlow 1's bilinear resize of (B, C, H, W) floats: source position i * H / size, without half-pixel
    centres.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        if n == size:
            continue
        position = torch.arange(size, dtype=x.dtype, device=x.device) * torch.tensor(n / size, dtype=x.dtype)
        low = position.long()
        weight = (position - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * weight
    return x


def resize_pil_bicubic(x: Tensor, size: int = SIZE) -> Tensor:
    """PIL's bicubic resize of float channels, clipped to [0, 255], not rounded. (B, C, H, W) -> (B, C,
    size, size)."""
    import numpy as np
    from PIL import Image

    if x.shape[-2:] == (size, size):
        return x
    channels = x.detach().to("cpu", torch.float32).flatten(0, 1).contiguous().numpy()
    bicubic = Image.Resampling.BICUBIC
    resized = [np.asarray(Image.fromarray(channel).resize((size, size), bicubic)) for channel in channels]
    y = torch.from_numpy(np.stack(resized)).clamp(0, 255)
    return y.view(*x.shape[:2], size, size).to(x.device)


class _Inception(nn.Module):
    """Floats (B, 3, H, W) in [0, 255] -> features (B, 2048), logits without bias (B, 1008)."""

    def __init__(self, graph: nn.Module, resize: Callable[[Tensor], Tensor]):
        super().__init__()
        self.resize = resize
        # torch-fidelity declares the stages in the order in which its forward calls them, `fc` last.
        self.stages = nn.Sequential(*(m for name, m in graph.named_children() if name != "fc"))
        fc = graph.get_submodule("fc")
        assert isinstance(fc, nn.Linear)
        self.fc = fc
        _fold_batch_norms(self.stages)
        self.stages.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (self.resize(x) - 128) / 128
        features = self.stages(x.contiguous(memory_format=torch.channels_last)).flatten(1)
        return features, features @ self.fc.weight.T


def _fold_batch_norms(module: nn.Module) -> None:
    for child in module.modules():
        conv, bn = getattr(child, "conv", None), getattr(child, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            child.conv, child.bn = fuse_conv_bn_eval(conv, bn), nn.Identity()


def _extractor(weights: str | Path | None, resize: str, function: Callable[[Tensor], Tensor]) -> Extractor:
    path, digest = find_weights(WEIGHTS, weights)
    network = _Inception(_graph(path), function)
    return Extractor(ExtractorId(INCEPTION_2015[0], "1", digest, resize, "2048", 2048), network, channels=3)


def _graph(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # The class unpickles whatever file it is given: it gets a copy of the tensors that were loaded
        # safely.
        copy = io.BytesIO()
        torch.save(state, copy)
        copy.seek(0)
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=copy)
    except Exception as error:
        raise ConfigError(f"{path} does not hold {WEIGHTS.what}: {error}") from error
