"""CLIP and DINOv2 as extractors, through torch-fidelity's classes (their resize is TF1's bilinear, so their
numbers have names of their own). Their weights are published, not shipped.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.metrics.extractors import Extractor, ExtractorId
from lit_gen.metrics.weights_files import Published, find_weights

__all__ = ["clip", "dinov2"]


class _Bytes(nn.Module):
    """torch-fidelity's extractors take bytes, do all the rest, and return a tuple of the layers asked for."""

    def __init__(self, extractor: nn.Module):
        super().__init__()
        self.extractor = extractor

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.extractor(x.to(torch.uint8))[0], None


def clip(model: str = "clip-vit-l-14-336px", weights: str | Path | None = None) -> Extractor:
    """OpenAI's image embeddings; `compare` adds CMMD to their metrics. https://arxiv.org/abs/2103.00020

    `model` is torch-fidelity's name of one; the default is CMMD's. Raises `ConfigError` if the weights
    could not be found or downloaded.
    """
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS, FeatureExtractorCLIP

    if model not in MODEL_URLS:
        raise ConfigError(f"model={model} is no CLIP; there are {', '.join(MODEL_URLS)}.")
    sha256 = MODEL_METADATA[model]["hash"]
    files = (f"{model}-{sha256}.pt", f"{MODEL_METADATA[model]['filename']}.pt")
    published = Published(f"OpenAI's CLIP weights {model}", files, MODEL_URLS[model], sha256, "0.1-1.3 GB")
    path, digest = find_weights(published, weights)
    try:
        network = FeatureExtractorCLIP(model, ["clip"], feature_extractor_weights_path=str(path))
    except Exception as error:
        raise ConfigError(f"{path} does not hold {published.what}: {error}") from error
    identity = ExtractorId(model, "1", digest, "tf1", "clip", network.model.visual.output_dim)
    return Extractor(identity, _Bytes(network), channels=3)


def dinov2(model: str = "dinov2-vit-l-14") -> Extractor:
    """The class token of DINOv2, on which FD-DINOv2 stands (https://arxiv.org/abs/2306.04675).

    torch.hub brings network and weights from facebookresearch/dinov2: its code runs on this machine. The
    weights' sha256 is of their tensors in the order of their names. Raises `ConfigError` if they could not be
    found or downloaded.
    """
    from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA, FeatureExtractorDinoV2

    if model not in MODEL_METADATA:
        raise ConfigError(f"model={model} is no DINOv2; there are {', '.join(MODEL_METADATA)}.")
    name = MODEL_METADATA[model]
    try:
        network = FeatureExtractorDinoV2(model, ["dinov2"])
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"This metric needs the DINOv2 network and weights {name}, which torch.hub could neither find in "
            f"{torch.hub.get_dir()} nor download ({error}). Run torch.hub.load('facebookresearch/dinov2', "
            f"'{name}') on a machine with internet and copy that folder, or choose the embedded extractor "
            "lit_gen.metrics.digits64, whose fd_digits64_... is not comparable with published numbers."
        ) from error
    assert isinstance(network.model, nn.Module)
    digest = hashlib.sha256()
    for _, tensor in sorted(network.model.state_dict().items()):
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    with torch.inference_mode():
        width = network(torch.zeros(1, 3, 14, 14, dtype=torch.uint8))[0].shape[1]
    identity = ExtractorId(model, "1", digest.hexdigest(), "tf1", "dinov2", width)
    return Extractor(identity, _Bytes(network), channels=3)
