"""The two small networks for 8x8 handwritten digits whose weights ship with the package
(`weights/*.safetensors`).

`scripts/train_digits_extractor.py` trained them on the train split of scikit-learn's digits, from different
seeds and with different widths: `digits64` gives the features of Frechet distances, `digits-classifier`
classifies samples independently of it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DigitsNet(nn.Module):
    """uint8 values as float (B, 1, 8, 8) in [0, 255] -> features (B, width) and logits (B, 10).

    The features are the spatial mean of the last convolution, before the head, divided by `scale`; training
    sets `scale` to the root of tr(cov) on its data, so that Frechet distances are of order 1.
    """

    scale: Tensor

    def __init__(self, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(width // 2, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)
        self.register_buffer("scale", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        x = x / 127.5 - 1
        x = F.silu(self.conv1(x))
        x = F.max_pool2d(F.silu(self.conv2(x)), 2)
        return F.silu(self.conv3(x)).mean((2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return features / self.scale, self.head(features)
