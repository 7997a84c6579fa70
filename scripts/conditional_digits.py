"""The tables and pictures of conditions in docs/results.md, from three runs (about 2 minutes of a CPU core):

python -m lit_gen.train experiment=digits_upscale hydra.run.dir=runs/upscale
python -m lit_gen.train experiment=digits model.num_classes=0 name=uncond hydra.run.dir=runs/uncond
python -m lit_gen.train experiment=digits_slant hydra.run.dir=runs/slant
python scripts/conditional_digits.py runs/upscale runs/uncond runs/slant [out_folder]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import lit_gen
from lit_gen.data import digits, slant
from lit_gen.images import grid, save_png, to_float, to_uint8
from lit_gen.metrics import Evaluation, digits64, digits_classifier, frechet_distance
from lit_gen.metrics.restored import quality
from lit_gen.models import classifier_free
from lit_gen.models.api import SampledModel
from lit_gen.score import Condition
from lit_gen.score.restoration import SuperResolution

SAMPLES = 2  # of each image


def fd(images: Tensor, reference: Tensor) -> float:
    """Of digits64's features."""
    moments = []
    for some in (reference, images):
        evaluation = Evaluation(digits64())
        evaluation.update(some, torch.arange(len(some)))
        moments.append(evaluation.summary().moments)
    return frechet_distance(moments[0], moments[1])


def upscaled(upscale: SampledModel, unconditional: SampledModel) -> dict[str, Tensor]:
    """(N, K, 1, 8, 8): ways from the 4x4 means of the test images to 8x8 pixels."""
    x = to_float(digits("test").images)
    operator = SuperResolution(2)
    small, n = operator(x), len(x)
    told = Condition(image=small)
    found = {
        "nearest neighbor": operator.pseudo_inverse(small)[:, None],
        "bicubic": interpolate(small, scale_factor=2, mode="bicubic")[:, None],
    }
    found = {name: to_uint8(images) for name, images in found.items()}
    found["PiGDM of the unconditional model"] = unconditional.restore(
        small, operator, samples=SAMPLES, num_steps=25, sigma_data=0.7
    )
    draws = [upscale.sample(n, seed=k, condition=told) for k in range(SAMPLES)]
    found["digits_upscale"] = torch.stack(draws, 1)
    return found


def rows_of_upscaling(found: dict[str, Tensor]) -> Iterator[str]:
    test = digits("test").images
    operator = SuperResolution(2)
    for name, images in found.items():
        mean = to_uint8(to_float(images).mean(1))
        consistency = (
            operator(to_float(images[:, 0])) - operator(to_float(test))
        ).square().mean().sqrt() * 127.5
        yield (
            f"| {name} | {quality(images[:, 0], test)['psnr']:.2f} | {quality(mean, test)['psnr']:.2f} "
            f"| {consistency:.1f} | {fd(images[:, 0], test):.4f} |"
        )


def asked_and_measured(model: SampledModel, weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slants asked for, those of the samples, the classes, and the samples, 5 of each class and slant."""
    asked = torch.linspace(-0.3, 0.3, 7).repeat_interleave(50)
    label = torch.arange(10).repeat(35)
    plain = model.module.denoiser
    if weight != 1:
        model.module.denoiser = classifier_free(model.module, weight, parts=["vector"])
    samples = model.sample(len(asked), seed=2, condition=Condition(label, asked[:, None]))
    model.module.denoiser = plain
    return asked, slant(to_float(samples))[:, 0], label, samples


def row_of_slants(name: str, asked: Tensor, measured: Tensor, label: Tensor, samples: Tensor) -> str:
    logits = digits_classifier().with_logits(samples)[1]
    assert logits is not None  # of a classifier
    right = (logits.argmax(1).cpu() == label).float().mean()
    correlation = torch.corrcoef(torch.stack([asked, measured]))[0, 1]
    slope = ((asked - asked.mean()) * measured).sum() / (asked - asked.mean()).square().sum()
    error = (measured - asked).square().mean().sqrt()
    return f"| {name} | {correlation:.3f} | {slope:.2f} | {error:.3f} | {100 * right:.1f} % |"


def show_upscaling(upscale: str, unconditional: str, folder: Path) -> None:
    found = upscaled(lit_gen.load(upscale), lit_gen.load(unconditional))
    print("| method | PSNR | PSNR of the mean of 2 | error of the 4x4 means | FD |\n|---|---|---|---|---|")
    print("\n".join(rows_of_upscaling(found)), flush=True)
    test = digits("test").images
    small = to_uint8(SuperResolution(2)(to_float(test))).repeat_interleave(2, 2).repeat_interleave(2, 3)
    shown = [small, found["bicubic"][:, 0], found["PiGDM of the unconditional model"][:, 0]]
    shown += [found["digits_upscale"][:, k] for k in range(2)] + [test]
    sheet = grid(torch.cat([images[:16] for images in shown]), columns=16, scale=4)
    save_png(sheet, folder / "digits_upscale.png")


def show_slants(slanted: str, folder: Path) -> None:
    model = lit_gen.load(slanted)
    print("\n| samples | correlation | slope | RMS error | class accuracy |\n|---|---|---|---|---|")
    told = asked_and_measured(model)
    asked, _, label, samples = told
    print(row_of_slants("`digits_slant`", *told), flush=True)
    guided = asked_and_measured(model, weight=2.0)
    print(row_of_slants("guided by the slant, weight 2", *guided), flush=True)
    nothing = Condition(label, torch.full((len(label), 1), torch.nan))
    untold = model.sample(len(label), seed=2, condition=nothing)
    print(row_of_slants("told the class alone", asked, slant(to_float(untold))[:, 0], label, untold))
    first = samples.view(7, 5, 10, 1, 8, 8)[:, 0]
    save_png(grid(first.flatten(0, 1), columns=10, scale=4), folder / "digits_slant_samples.png")
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), sharey=True)
    for axis, (x, y, *_), title in zip(axes, (told, guided), ("as trained", "guided, weight 2"), strict=True):
        axis.plot([-0.35, 0.35], [-0.35, 0.35], color="gray", linewidth=1)
        axis.scatter(x + 0.02 * torch.rand(len(x)) - 0.01, y, s=4, alpha=0.4)
        axis.set(title=title, xlabel="slant asked for")
    axes[0].set_ylabel("slant of the sample")
    figure.tight_layout()
    figure.savefig(folder / "digits_slant.png", dpi=100)


def main(upscale: str, unconditional: str, slanted: str, out: str = ".") -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    show_upscaling(upscale, unconditional, folder)
    show_slants(slanted, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
