"""How near restored images are to their originals: PSNR, SSIM, LPIPS."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from lit_gen.errors import ConfigError
from lit_gen.images import to_float

ALEXNET, SMALLEST_FOR_ALEXNET = "alexnet-owt-7be5be79.pth", 31


def quality(images: Tensor, originals: Tensor, data_range: float = 255.0) -> dict[str, float]:
    """Means over the images (N, C, H, W), whose values have a range of the length `data_range`, of PSNR in dB
    and SSIM with a Gaussian window, of 11 pixels or, below 16 pixels of image, of 5.
    """
    a, b = images.to(torch.float64), originals.to(torch.float64)
    small = min(originals.shape[-2:]) < 16
    ssim = structural_similarity_index_measure(a, b, data_range=data_range, sigma=0.5 if small else 1.5)
    assert isinstance(ssim, Tensor)
    psnr = peak_signal_noise_ratio(a, b, data_range=data_range, reduction="elementwise_mean", dim=(1, 2, 3))
    return {"psnr": float(psnr), "ssim": float(ssim), "ssim_window": 5 if small else 11}


class Perceptual:
    """LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924) with AlexNet, the mean over the images:
    {"lpips": value}, or {} where it cannot be computed.

    `weights` is torchvision's file alexnet-owt-7be5be79.pth; None: from torch's cache if it is there. Nothing
    is downloaded. `name` is the file, or why there is none. Raises ConfigError for a file that is missing.
    """

    def __init__(self, weights: str | None, image_size: int, channels: int = 3):
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        path = folder / ALEXNET if weights is None else Path(weights)
        self.metric, self.name = None, str(path)
        if weights is not None and not path.is_file():
            raise ConfigError(f"lpips={weights}: there is no such file.")
        if not path.is_file():
            self.name = f"left out, for it needs torchvision's {ALEXNET}: give lpips=<that file>"
        elif channels not in (1, 3):
            self.name = f"left out, for AlexNet sees gray or color, not {channels} channels"
        elif image_size < SMALLEST_FOR_ALEXNET:
            self.name = f"left out, for AlexNet needs images of {SMALLEST_FOR_ALEXNET} pixels"
        else:
            self.metric = _lpips(path)

    @torch.no_grad()
    def __call__(self, images: Tensor, originals: Tensor) -> dict[str, float]:
        """Of uint8 (N, C, H, W); grey ones count as colour."""
        if self.metric is None:
            return {}
        self.metric.reset()
        for a, b in zip(images.split(64), originals.split(64), strict=True):
            pair = (to_float(x).clamp(-1, 1).expand(-1, 3, -1, -1) for x in (a, b))
            self.metric.update(*pair)
        return {"lpips": float(self.metric.compute())}


class PerceptualLoss:
    """LPIPS of images in [-1, 1], (B, C, H, W) with one or three channels -> (B,), as a loss. `weights` is
    torchvision's file alexnet-owt-7be5be79.pth, which `load` reads; nothing is downloaded."""

    def __init__(self, weights: str):
        self.weights = weights
        self._network: torch.nn.Module | None = None

    def load(self, device: torch.device) -> None:
        """Raises ConfigError for a file that is not there."""
        if not Path(self.weights).is_file():
            raise ConfigError(
                f"model.perceptual.weights={self.weights}: there is no such file. It is torchvision's "
                f"{ALEXNET}; model.perceptual=null trains without."
            )
        self._network = _lpips(Path(self.weights)).net.requires_grad_(False).to(device)

    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        if min(images.shape[-2:]) < SMALLEST_FOR_ALEXNET or images.shape[1] not in (1, 3):
            raise ConfigError(
                f"model.perceptual: AlexNet sees gray or color images of {SMALLEST_FOR_ALEXNET} pixels or "
                f"more, and these are {tuple(images.shape[1:])}. Set model.perceptual=null."
            )
        assert self._network is not None  # since `load`
        pair = (x.float().expand(-1, 3, -1, -1) for x in (images, originals))
        return self._network(*pair).flatten()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_network": None}


def _lpips(alexnet: Path) -> LearnedPerceptualImagePatchSimilarity:
    """torchmetrics' LPIPS, which looks for its backbone in torch's cache alone."""
    before = torch.hub.get_dir()
    with TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / ALEXNET).symlink_to(alexnet.resolve())
        torch.hub.set_dir(folder)
        try:
            return LearnedPerceptualImagePatchSimilarity(net_type="alex")
        finally:
            torch.hub.set_dir(before)
