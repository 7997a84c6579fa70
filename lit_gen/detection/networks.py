"""A small one-stage detector: torchvision's FCOS (https://arxiv.org/abs/1904.01355) on a backbone of its own.

`net(images, targets)` in training gives a dict of losses, `net(images)` in eval mode a list of {"boxes":
float (K, 4) xyxy pixels, "scores": (K,), "labels": int64 (K,)}, best first. `images` is a list of float (3,
H, W) in [-1, 1]; `targets` a list of {"boxes", "labels"}, labels counted from 0.
"""

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.ops import FeaturePyramidNetwork

from lit_gen.errors import ConfigError


class PyramidBackbone(nn.Module):
    """Feature maps at strides 4, 8, ... 2^(levels + 1), each with `out_channels` = 2 `width` channels.

    Group normalization: batches are small, and the weights of an average need no statistics of their own.
    """

    def __init__(self, width: int = 16, levels: int = 2):
        super().__init__()
        if width < 16 or width % 16 or levels < 1:  # FCOS's head normalizes 32 groups of 2 width
            raise ConfigError(
                f"width={width} must be a multiple of 16 and levels={levels} at least 1 (the detector)."
            )
        self.out_channels = 2 * width
        widths = [width, *(width << min(i + 1, 2) for i in range(levels))]
        self.stem = nn.Sequential(_block(3, width, 2), _block(width, width, 1))
        stages = (nn.Sequential(_block(a, b, 2), _block(b, b, 1)) for a, b in pairwise(widths))
        self.stages = nn.ModuleList(stages)
        self.pyramid = FeaturePyramidNetwork(widths[1:], self.out_channels)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x, maps = self.stem(x), OrderedDict()
        for i, stage in enumerate(self.stages):
            x = maps[str(i)] = stage(x)
        return self.pyramid(maps)


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.ReLU())


def small_fcos(
    num_classes: int, image_size: int, width: int = 16, levels: int = 2, num_convs: int = 2
) -> FCOS:
    """FCOS for images whose shorter side is `image_size` (others are resized, their boxes given back at the
    images' own size). Some 136,000 parameters at width 16."""
    if num_classes < 1 or image_size < 32:
        raise ConfigError(
            f"num_classes={num_classes} must be at least 1 and image_size={image_size} at least 32 pixels."
        )
    backbone = PyramidBackbone(width, levels)
    strides = tuple((4 << i,) for i in range(levels))
    return FCOS(
        backbone,
        num_classes,
        min_size=image_size,
        max_size=4 * image_size,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        size_divisible=2 << levels,
        anchor_generator=AnchorGenerator(strides, ((1.0,),) * levels),
        head=FCOSHead(backbone.out_channels, 1, num_classes, num_convs),
        score_thresh=0.05,
        nms_thresh=0.5,
    )
