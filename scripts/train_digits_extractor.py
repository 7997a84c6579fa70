"""Trains the two digit networks that ship in lit_gen/metrics/weights (about 5 minutes on one CPU core).

    python scripts/train_digits_extractor.py [out_folder]

Data: scikit-learn's 1,797 digits, the stratified split of `lit_gen.data.digits` (360 test images); the test
images are used for the recorded accuracy alone. Each network sees random affine maps of the train images and
is averaged over the last steps.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor
from torch.nn import functional as F

from lit_gen.data.digits import digits
from lit_gen.metrics.digits import DigitsNet

NETWORKS = {"digits64": {"width": 64, "seed": 64}, "digits-classifier": {"width": 80, "seed": 1}}


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random rotation (12 degrees), scale and shear (10 %), shift (0.8 pixels): standard deviations of half
    of these.
    """
    n = len(x)

    def draw(sd: float) -> Tensor:
        return torch.randn(n, generator=generator).clamp(-2, 2) * sd

    angle, shear = draw(math.radians(6)), draw(0.05)
    a, b = 1 + draw(0.05), 1 + draw(0.05)
    cos, sin = angle.cos(), angle.sin()
    shift = torch.stack([draw(0.1), draw(0.1)], -1)
    rows = torch.stack([torch.stack([a * cos, shear - sin], -1), torch.stack([sin, b * cos], -1)], 1)
    grid = F.affine_grid(torch.cat([rows, shift[..., None]], -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def train(
    width: int, seed: int, images: Tensor, labels: Tensor, steps: int = 4000, batch: int = 128
) -> DigitsNet:
    """AdamW with a cosine schedule; returns the average of the weights over the last fifth of the steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = DigitsNet(width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    average = torch.optim.swa_utils.AveragedModel(net)
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        _, logits = net(augment(images[rows], generator))
        loss = F.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step >= steps - steps // 5:
            average.update_parameters(net)
    return average.module.eval()


@torch.no_grad()
def report(net: DigitsNet, images: Tensor, labels: Tensor) -> dict[str, float]:
    probabilities = net(images)[1].softmax(-1)
    return {
        "accuracy": round((probabilities.argmax(-1) == labels).double().mean().item(), 4),
        "confident_fraction": round((probabilities.amax(-1) > 0.9).double().mean().item(), 4),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    train_set, test_set = digits("train"), digits("test")
    images, labels = train_set.images.to(torch.float32), train_set.labels
    folder.mkdir(parents=True, exist_ok=True)
    for name, options in NETWORKS.items():
        net = train(**options, images=images, labels=labels)
        with torch.no_grad():
            trace = torch.cov(net(images)[0].T.double()).trace()
            net.scale.copy_(trace.sqrt())
        tensors = {key: value.contiguous() for key, value in net.state_dict().items()}
        about = {
            "name": name,
            "version": "1",
            "width": options["width"],
            "seed": options["seed"],
            "data": "scikit-learn digits: 1437 train images, stratified, 360 held out, random_state 0",
            "layer": "mean",
            "resize": "antialias8",
            "test": report(net, test_set.images.to(torch.float32), test_set.labels),
            "train": report(net, images, labels),
            "sha256": hashlib.sha256(save(tensors)).hexdigest(),
        }
        path = folder / f"{name}.safetensors"
        save_file(tensors, path, metadata={"about": json.dumps(about)})
        path.chmod(0o644)
        print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "lit_gen/metrics/weights")
