"""Networks that turn images into features, and the identity that names every number computed from them.

An extractor takes uint8 (B, C, H, W) of any size, resizes by its own rule, and gives float32 (B, d). Two
Frechet distances are comparable only if network, weights, layer and resize agree, so `ExtractorId` holds all
four and alone builds the metrics' names.
"""

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gen.errors import ConfigError
from lit_gen.images import BYTES, Pixels
from lit_gen.metrics.digits import DigitsNet
from lit_gen.precision import full_float32, switched

__all__ = ["Extractor", "ExtractorId", "digits64", "digits_classifier", "own_extractor", "pixel_means"]

INCEPTION_2015 = ("inception-2015-12-05", "6726825d")
PUBLISHED = {
    "fd": "fid",
    "kd": "kid",
    "is": "isc",
}  # our metric -> its published name, with the 2015 network only


@dataclass(frozen=True)
class ExtractorId:
    """What a feature depends on: network `name` and `version`, `sha256` of the weights, `resize`, `layer`,
    and its width `d`.
    """

    name: str
    version: str
    sha256: str
    resize: str
    layer: str
    d: int

    @property
    def hash8(self) -> str:
        return self.sha256[:8]

    def key(self, metric: str, n: int) -> str:
        """`fid50k` for the 2015 Inception with TF1's resize, `fid_clean50k` with PIL's, else
        `fd_<name>_<hash8>_n<n>`.

        `metric` is fd (Frechet distance), kd (kernel distance), is (Inception score) or any other short name.
        """
        published = metric in PUBLISHED and (self.name, self.hash8) == INCEPTION_2015
        if published and self.layer == "2048" and self.resize in ("tf1", "clean"):
            suffix = "_clean" if self.resize == "clean" else ""
            return PUBLISHED[metric] + suffix + (f"{n // 1000}k" if n % 1000 == 0 else str(n))
        return f"{metric}_{self.name}_{self.hash8}_n{n}"

    def __str__(self) -> str:
        return f"{self.name} v{self.version} ({self.hash8}, layer {self.layer}, resize {self.resize})"


class Extractor:
    """A frozen network behind the uint8 door. Not an `nn.Module`: a metric or callback that holds one has no
    more parameters, a larger state_dict or another dtype for it.

    `network` maps float32 (B, channels, H, W) in [0, 255] to (features (B, d), logits (B, classes) or None).
    It runs in eval mode, in full float32 (no autocast, no TF32), without gradients, on the device of the
    images. `pixels` says how the images are stored that it is given (`reading`): a network of pictures sees
    them as bytes, gray or in color; one of other images (`exact`), with as many channels as it takes, as
    float32 in [-1, 1] by their range.
    """

    def __init__(self, id: ExtractorId, network: nn.Module, channels: int, exact: bool = False):
        self.id = id
        self.network = network.eval().requires_grad_(False).to(torch.float32)
        self.channels, self.exact, self.pixels = channels, exact, BYTES

    def reading(self, pixels: Pixels, channels: int) -> "Extractor":
        """The extractor for images stored so, with so many channels. Raises ConfigError where its network
        cannot see them."""
        if channels != self.channels if self.exact else channels not in (1, 3):
            takes = f"{self.channels} channels" if self.exact else "pictures, gray or in color"
            raise ConfigError(
                f"The images have {channels} channels, {self.id.name} takes {takes}: a Frechet distance of "
                "them needs a feature network of their own (extractor=own, or extractor=pixels for the means "
                "of their pixels), or none (metrics=none)."
            )
        other = copy.copy(self)
        other.pixels = pixels
        return other

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) as `pixels` says, uint8 of C 1 or 3 by default -> float32 (B, d)."""
        return self.with_logits(images)[0]

    def with_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, d), and logits (B, classes) if the network has a head. Raises ConfigError where the
        network gives another shape."""
        x = self._door(images)
        if len(x) == 0:
            # Convolutions refuse an empty batch on some backends; one image shows the widths.
            features, logits = self.with_logits(images.new_zeros(1, *images.shape[1:]))
            return features[:0], None if logits is None else logits[:0]
        self.network.to(x.device)
        cudnn = torch.backends.cudnn
        repeatable = switched((cudnn, "deterministic", True), (cudnn, "benchmark", False))
        autocast = torch.autocast(x.device.type, enabled=False)
        with torch.inference_mode(), autocast, full_float32(), repeatable:
            features, logits = self.network(x)
        if features.shape != (len(x), self.id.d):
            raise ConfigError(
                f"{self.id} should give features (B, {self.id.d}), got {tuple(features.shape)}."
            )
        return features, logits

    def _door(self, images: Tensor) -> Tensor:
        """Checks; float32 in [0, 255] with the network's channels: gray is repeated, color averaged."""
        if self.exact:
            return self.pixels.to_model(images)
        if images.dtype == self.pixels.torch_dtype:
            images = self.pixels.to_uint8(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ConfigError(
                f"Extractors take uint8 images (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}; "
                "lit_gen.images.to_uint8 converts floats in [-1, 1]."
            )
        x = images.to(torch.float32)
        if self.channels == 1:
            return x.mean(1, keepdim=True)
        return x.expand(-1, self.channels, -1, -1)


def own_extractor(
    network: nn.Module, features: int, channels: int = 3, weights: str | None = None, name: str = "own"
) -> Extractor:
    """A feature network of the user's for images of any type and number of channels: `network` maps float32
    (B, channels, H, W), the stored values with their range brought to [-1, 1], to (B, features).

    `weights` is a file of its state dict, by `torch.save` or as safetensors; the weights are part of the
    identity. Raises ConfigError for a file that is missing or of another network.
    """
    if weights is not None:
        try:
            state = (
                load_file(weights)
                if weights.endswith(".safetensors")
                else torch.load(weights, map_location="cpu", weights_only=True)
            )
            network.load_state_dict(state)
        except Exception as error:  # of whatever kind: it is the user's file
            raise ConfigError(f"extractor.weights={weights} cannot be loaded: {error}") from error
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    identity = ExtractorId(name, "1", digest.hexdigest(), "none", "output", features)
    return Extractor(identity, _Featured(network), channels, exact=True)


def pixel_means(channels: int = 3, size: int = 4) -> Extractor:
    """The means of size x size regions of every channel (d = channels size^2): features of images for which
    there is no network. They see colors and coarse shapes, and nothing that is finer."""
    name = f"pixels{size}x{size}x{channels}"
    identity = ExtractorId(
        name, "1", hashlib.sha256(name.encode()).hexdigest(), "none", "means", channels * size**2
    )
    network = nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten())
    return Extractor(identity, _Featured(network), channels, exact=True)


class _Featured(nn.Module):
    """A network of features as an extractor calls it: without logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.network(x), None


def digits64() -> Extractor:
    """The embedded features of 8x8 handwritten digits (d = 64); needs no download."""
    return _embedded("digits64")


def digits_classifier() -> Extractor:
    """The embedded classifier of digits, trained independently of `digits64`; its logits (B, 10) give the
    fraction of confident samples.
    """
    return _embedded("digits-classifier")


class _Resized(nn.Module):
    """Images of other sizes are brought to size x size by torch's antialiased bilinear filter."""

    def __init__(self, network: nn.Module, size: int):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network(x)


def _embedded(name: str) -> Extractor:
    path = Path(__file__).parent / "weights" / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    network = DigitsNet(about["width"])
    network.load_state_dict(tensors)
    identity = ExtractorId(
        name, about["version"], about["sha256"], about["resize"], about["layer"], about["width"]
    )
    return Extractor(identity, _Resized(network, 8), channels=1)
