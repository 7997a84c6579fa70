"""Digits of which a square is erased to paper white, or covered by a blot, and restored by one rule that is
told of neither: phonemic restoration for the eye (docs/phonemic-restoration.md).

    python -m lit_gen.train hydra.run.dir=runs/digits/first        # about two minutes on two cores
    python scripts/silence_or_blot.py runs/digits/first            # writes blots.png
"""

import argparse
import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import lit_gen
from lit_gen.data import digits
from lit_gen.images import grid, to_float, to_uint8
from lit_gen.metrics import digits_classifier
from lit_gen.score.restoration import Masked, NoisyPixels, Observation

RATE = 3 * math.log(10)  # ink is a power on a logarithmic scale, a unit of which is 30 dB
STD, BLOT_STD = 0.07, 0.1
SIDE = 4  # pixels of the gap, and of the squares in which blots are looked for
LEAST_OF_16 = 1.77  # by how many deviations the least of so many normal numbers is below their mean
LEVELS = (-0.5, 0.0, 0.5, 1.0)  # of blots; the paper is -1, the blackest ink 1


def floor(y: Tensor) -> Tensor:
    """The level of the blots in pictures y (N, 1, H, W), told from y alone: what all pixels of some 4x4
    square around a pixel exceed, if that were noise; -inf where that is paper."""
    least = F.pad(-F.max_pool2d(-y, SIDE, 1), (SIDE - 1,) * 4, value=-1.0)
    level = F.max_pool2d(least, SIDE, 1)
    return torch.where(level > -0.9, level + LEAST_OF_16 * BLOT_STD, -torch.inf)


def conditions(x: Tensor) -> dict[str, tuple[Tensor, Observation]]:
    """What is seen of digits x (N, 1, 8, 8), and what is believed of it."""
    gap = F.pad(torch.ones(SIDE, SIDE, dtype=torch.bool), (2,) * 4)
    noise = BLOT_STD * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    erased = torch.where(gap, -1.0, x)
    seen = {"whole": x, "silence": erased}
    for level in LEVELS:  # powers add
        seen[f"blot {level:+}"] = torch.where(
            gap, torch.logaddexp(RATE * x, RATE * (level + noise)) / RATE, x
        )
    found = {k: (y, Masked(floor(y), rate=RATE, std=STD, floor_std=BLOT_STD)) for k, y in seen.items()}
    found["blot +1.0 taken for ink"] = seen["blot +1.0"], NoisyPixels(STD)
    return found | {"gap told": (erased, NoisyPixels(STD, ~gap))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--first", type=int, default=64, help="the test image to begin with")
    parser.add_argument("--num", type=int, default=296)
    parser.add_argument("--out", default="blots.png")
    args = parser.parse_args()
    items = [digits("test")[i] for i in range(args.first, args.first + args.num)]
    x = to_float(torch.stack([torch.as_tensor(item["image"]) for item in items]))
    labels = torch.tensor([int(item["label"]) for item in items])
    model, judge, rows = lit_gen.load(args.run), digits_classifier(), {}
    for name, (y, belief) in conditions(x).items():
        restored = model.restore(y, belief, num_steps=30, sigma_data=0.3, batch_size=len(y))[:, 0]
        texts = []
        for images in (to_uint8(y), restored):
            right = (judge.with_logits(images)[1].argmax(1).cpu() == labels).double()
            texts.append(f"{100 * right.mean():5.1f} +- {100 * right.std() / len(right) ** 0.5:.1f} %")
        print(f"{name:24} recognized as it is {texts[0]}, restored {texts[1]}", flush=True)
        rows |= {name: to_uint8(y), f"{name}, restored": restored}
    for name in (
        "whole, restored",
        "blot -0.5",
        "blot -0.5, restored",
        "blot +1.0 taken for ink",
        "gap told",
    ):
        del rows[name]
    one_each = [labels.tolist().index(c) for c in labels.unique().tolist()]
    sheet = 255 - grid(torch.cat([images[one_each] for images in rows.values()]), len(one_each), scale=6)
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(sheet.permute(1, 2, 0), interpolation="nearest")
    axis.set(xticks=[], yticks=[49 * k + 25 for k in range(len(rows))], yticklabels=rows)
    figure.savefig(args.out, dpi=120, bbox_inches="tight")
    print(args.out)


if __name__ == "__main__":
    main()
