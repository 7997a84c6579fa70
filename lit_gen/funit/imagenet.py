"""The networks that measure translations in FUNIT's paper (Liu et al. 2019, section 4,
https://arxiv.org/abs/1905.01723), from torchvision's ImageNet weights: Inception-V3, to be fine-tuned as a
classifier, and VGG-16 for DIPD.

Images are uint8 (N, C, H, W), C 1 or 3; gray ones count as color.
"""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from lit_gen.errors import ConfigError
from lit_gen.images import to_float


class InceptionV3(nn.Module):
    """Inception-V3 (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567) with a head of `num_classes`, with
    the interface of `ResNet10`.

    Images are resized to 299 x 299. `load_imagenet` takes torchvision's weights; else they are random.
    """

    name = "inception-v3"
    fine_tuning_lr = 1e-4
    num_features = 2048

    def __init__(self, num_classes: int, channels: int = 3):
        super().__init__()
        self.config = {"network": self.name, "num_classes": num_classes, "channels": channels}
        whole = models.inception_v3(weights=None, aux_logits=False, init_weights=False)
        maps = [(name, m) for name, m in whole.named_children() if name not in ("avgpool", "dropout", "fc")]
        self.blocks = nn.Sequential(OrderedDict(maps))
        self.head = nn.Linear(self.num_features, num_classes)

    def load_imagenet(self, path: str | Path) -> "InceptionV3":
        """Weights of torchvision's inception_v3_google-0cc3c7bd.pth, all but its heads. Raises ConfigError
        for another file."""
        _load(self.blocks, path, "", ("AuxLogits.", "fc."))
        return self

    def maps(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 2048, 8, 8)."""
        x = _colour(to_float(images).to(self.head.weight))  # these weights take [-1, 1]
        return self.blocks(F.interpolate(x, (299, 299), mode="bilinear", antialias=True))

    def features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 2048)."""
        return self.maps(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        return self.head(F.dropout(self.features(images), 0.5, self.training))


class VGG16Maps(nn.Module):
    """(N, C, H, W) -> (N, 512, H // 16, W // 16), the maps after relu5_3 of VGG-16 (Simonyan & Zisserman
    2014, https://arxiv.org/abs/1409.1556) from torchvision's vgg16-397923af.pth: what the paper's DIPD
    compares.

    MUNIT's code, which the paper refers to, takes the weights of Caffe (BGR, 0 to 255); these take RGB,
    standardized. Raises ConfigError for another file and for images below 32 pixels, of which no map is left
    to be normalized.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path: str | Path):
        super().__init__()
        self.layers = models.vgg.make_layers(models.vgg.cfgs["D"])[:30]
        _load(self.layers, path, "features.", ("features.30", "classifier."))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 32:
            raise ConfigError(f"VGG's maps need images of 32 pixels, got {tuple(images.shape[-2:])}.")
        x = _colour(images.to(self.mean) / 255)
        return self.layers((x - self.mean) / self.std)


def _colour(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1)


def _load(network: nn.Module, path: str | Path, prefix: str, without: tuple[str, ...]) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        kept = {k.removeprefix(prefix): v for k, v in state.items() if not k.startswith(without)}
        network.load_state_dict(kept)
    except Exception as error:  # torch raises half a dozen types here; all mean the same to the user
        raise ConfigError(
            f"{path} does not hold torchvision's weights: {str(error).splitlines()[0]}"
        ) from error
