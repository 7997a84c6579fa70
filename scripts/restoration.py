"""The tables and the sheet of restoration methods in docs/results.md, from the run of a score model:

python -m lit_gen.train hydra.run.dir=runs/digits
python scripts/restoration.py runs/digits docs/images 200

Restores the first test images by every method: means of PSNR and SSIM, the Fréchet distance of the
restorations to all test images in the features of `digits64`, and CPU seconds of this process.
"""

import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

import lit_gen
from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png, to_float, to_uint8
from lit_gen.inputs import mask_of, run_data
from lit_gen.metrics import Evaluation, Moments, digits64, frechet_distance
from lit_gen.metrics.restored import quality
from lit_gen.models.api import SampledModel
from lit_gen.rng import keyed_generator
from lit_gen.score.restoration import Blur, Inpainting, LinearOperator, SuperResolution, gaussian_kernel

METHODS = {
    "replacement": {"num_steps": 100},
    "repaint": {"num_steps": 25},
    "dps": {"num_steps": 100},
    "pigdm": {"num_steps": 50},
    "mmps": {"num_steps": 25},
    "ddrm": {"num_steps": 20},
    "ddnm": {"num_steps": 100},
    "diffpir": {"num_steps": 50},
}
"""conf/method, with fewer steps than there for those that are slow."""
SHOWN = 4  # images of each degradation in the sheet


def degradations(size: tuple[int, int]) -> dict[str, tuple[LinearOperator, float]]:
    return {
        "inpaint, mask=center": (Inpainting(mask_of("center", size)), 0.0),
        "super_resolution, factor 2": (SuperResolution(2), 0.0),
        "blur, noise_std=0.05": (Blur(gaussian_kernel(1.0)), 0.05),
    }


def moments(images: Tensor) -> Moments:
    """Of digits64's features."""
    evaluation = Evaluation(digits64())
    evaluation.update(images, torch.arange(len(images)))
    return evaluation.summary().moments


def restored(
    model: SampledModel, y: Tensor, operator: LinearOperator, std: float, label: Tensor, names: list[str]
) -> Iterator[tuple[str, Tensor | None, float]]:
    """(method, images or None where it is refused, CPU seconds)."""
    for name in names:
        start, made = time.process_time(), None
        try:
            made = model.restore(y, operator, method=name, noise_std=std, label=label, **METHODS[name])[:, 0]
        except ConfigError as refusal:
            print(f"{name}: {refusal}", file=sys.stderr)
        yield name, made, time.process_time() - start


def main(run: str, out: str = ".", num: str = "200", *names: str) -> None:
    model = lit_gen.load(run)
    assert isinstance(model, SampledModel) and model.config is not None
    test = run_data(model.config).dataset("test")
    rows = [test[i] for i in range(len(test))]
    images = torch.stack([row["image"] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])[: int(num)]
    everything, originals = moments(images), images[: int(num)]
    sheet = []
    for title, (operator, std) in degradations(tuple(originals.shape[-2:])).items():
        y = operator(to_float(originals))
        y = y + std * torch.randn(y.shape, generator=keyed_generator(0, "measurement"))
        seen = to_uint8(y if y.shape == originals.shape else operator.pseudo_inverse(y))
        print(f"\n{title}\n\n| method | PSNR (dB) | SSIM | FD | CPU s |\n|---|---|---|---|---|")
        columns, given = [], [("original", originals, 0.0), ("measurement", seen, 0.0)]
        made_by = restored(model, y, operator, std, labels, list(names or METHODS))
        for name, made, seconds in chain(given, made_by):
            if made is None:
                print(f"| `{name}` | refused | | | |")
                made = torch.full_like(originals, 128)
            else:
                near = quality(made, originals)
                fd = frechet_distance(moments(made), everything)
                print(
                    f"| `{name}` | {near['psnr']:.2f} | {near['ssim']:.3f} | {fd:.4f} | {seconds:.1f} |",
                    flush=True,
                )
            columns.append(made)
        sheet += [torch.stack([column[i] for column in columns]) for i in range(SHOWN)]
    name = model.config.name
    save_png(grid(torch.cat(sheet), columns=len(sheet[0]), scale=0), Path(out) / f"{name}_methods.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
