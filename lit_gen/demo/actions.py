"""What the page does, without the page: functions of models and tensors."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_gen.augment import Policy, RandAugment, TrivialAugmentWide, shipped_policies
from lit_gen.augment.sheet import policy_sheet
from lit_gen.errors import ConfigError, check_choice
from lit_gen.funit import translator
from lit_gen.images import to_float, to_uint8
from lit_gen.models import check_label, classifier_free
from lit_gen.models.api import SampledModel, Translator
from lit_gen.rng import keyed_generator
from lit_gen.score.condition import Label
from lit_gen.score.denoiser import AbstractDenoiser, CountingDenoiser
from lit_gen.score.module import ScoreModule
from lit_gen.score.restoration import (
    Blur,
    Colorization,
    Denoising,
    Inpainting,
    LinearOperator,
    NoisyPixels,
    Observation,
    SuperResolution,
    gaussian_kernel,
)

SAMPLERS = ("heun", "heun_stochastic", "dpm_solver", "unipc", "ddim", "euler", "euler_maruyama")
METHODS = ("pigdm", "ddrm", "ddnm", "diffpir", "mmps", "dps", "repaint", "replacement")
OPERATORS = ("gap", "half the size", "blur", "noise", "gray")
GAPS = ("noise", "silence")
POLICIES = (*shipped_policies(), "mosaic", "flip_boxes", "randaugment", "trivialaugment")
MAX_IMAGES, MAX_STEPS, MAX_FRAMES, FILMED = 64, 250, 24, 4
BELIEVED = 0.05  # the deviation of pixels that are taken as they are seen, images being [-1, 1]

_in_use = threading.Lock()  # a module's denoiser is exchanged while it is watched


@dataclass(frozen=True)
class Result:
    """Images uint8 (N, C, H, W) as they are looked at, what it took, and how the first few came to be:
    `frames`, uint8 (F, n, 2, C, H, W), before each of F network evaluations the noisy image and the
    denoiser's estimate of the image, at most 24 of them, evenly spread."""

    images: Tensor
    nfe: float
    seconds: float
    frames: Tensor

    @property
    def cost(self) -> str:
        return f"{self.nfe:g} network evaluations an image, {self.seconds:.1f} s for {len(self.images)}"


class FilmedDenoiser(AbstractDenoiser):
    """A denoiser of which the first images of every call are kept: `frames`, pairs (x_t, x0_hat) of float32
    (n, C, H, W) on the CPU, of every `stride`-th call, which doubles when there are too many."""

    def __init__(self, denoiser: AbstractDenoiser, rows: int):
        super().__init__()
        self.denoiser, self.process, self.rows = denoiser, denoiser.process, rows
        self.frames: list[tuple[Tensor, Tensor]] = []
        self.calls, self.stride, self.start = 0, 1, time.perf_counter()

    def forward(self, x_t: Tensor, t: Tensor, label: Label = None) -> Tensor:
        x0_hat = self.denoiser(x_t, t, label)
        self._keep(x_t, x0_hat)
        return x0_hat

    def with_variance(
        self, x_t: Tensor, t: Tensor, label: Label = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        x0_hat, v = self.denoiser.with_variance(x_t, t, label, **others)
        self._keep(x_t, x0_hat)
        return x0_hat, v

    def _keep(self, x_t: Tensor, x0_hat: Tensor) -> None:
        if len(x_t) == self.rows and self.calls % self.stride == 0:  # some solvers go on with some images
            self.frames.append((x_t[:FILMED].detach().float().cpu(), x0_hat[:FILMED].detach().float().cpu()))
            if len(self.frames) > MAX_FRAMES:
                self.frames, self.stride = self.frames[::2], 2 * self.stride
        self.calls += 1


@contextmanager
def watched(
    module: ScoreModule, rows: int, guidance: float = 1.0
) -> Iterator[tuple[CountingDenoiser, FilmedDenoiser]]:
    """Inside, the module's denoiser is guided (1: is not), counted, and filmed; one caller at a time. Raises
    ConfigError for a module that cannot be guided by itself."""
    with _in_use:
        own = module.denoiser
        try:
            counting: Any = CountingDenoiser(own)
            module.denoiser = counting
            filmed: Any = FilmedDenoiser(
                counting if guidance == 1 else classifier_free(module, guidance), rows
            )
            module.denoiser = filmed
            yield counting, filmed
        finally:
            module.denoiser = own


def _result(module: ScoreModule, images: Tensor, counted: CountingDenoiser, filmed: FilmedDenoiser) -> Result:
    seconds = time.perf_counter() - filmed.start
    frames = [
        torch.stack([_shown(module, x_t, True), _shown(module, x0_hat, False)], 1)
        for x_t, x0_hat in filmed.frames
    ]
    nfe = round(counted.evaluations / len(images), 1)
    return Result(module.pixels.picture(images), nfe, seconds, torch.stack(frames))


def _shown(module: ScoreModule, x: Tensor, noisy: bool) -> Tensor:
    """What a person sees of x_t or x0_hat: noise is scaled into the range of pixels, and latents, whose noise
    is no picture, are decoded."""
    if module.codec is not None:
        return module.pixels.picture(module.pictures(x.to(module.device)).cpu())
    if noisy:
        x = x / (x.flatten(1).std(1) / 0.8).clamp(min=1).reshape(-1, 1, 1, 1)
    return module.pixels.picture(module.pixels.from_model(x))


def generate(
    model: SampledModel,
    *,
    num: int = 16,
    label: int | None = None,
    sampler: str | None = None,
    num_steps: int = 18,
    guidance: float = 1.0,
    seed: int = 0,
) -> Result:
    """`num` images, image i from (seed, i), all of the class `label`, or of class i mod the number of classes
    where it is None. `sampler` is one of SAMPLERS, None that of the model, which may be without a number of
    steps. Raises ConfigError."""
    _check(num, num_steps, seed)
    if sampler is not None:
        check_choice("sampler", sampler, SAMPLERS)
    own = model.module.sampler
    if "num_steps" in getattr(own, "keywords", {}):
        own = partial(own, num_steps=num_steps)
    options: dict[str, Any] = (
        {"sampler": own} if sampler is None else {"sampler": sampler, "num_steps": num_steps}
    )
    with watched(model.module, num, guidance) as (counted, filmed):
        images = model.sample(num, seed=seed, label=label, batch_size=num, **options)
        return _result(model.module, images, counted, filmed)


def restore(
    model: SampledModel,
    image: Tensor,
    unknown: Tensor | None = None,
    *,
    operator: str = "gap",
    gap: str = "noise",
    method: str = "pigdm",
    num_steps: int = 50,
    noise_std: float = 0.0,
    label: int | None = None,
    guidance: float = 1.0,
    samples: int = 4,
    seed: int = 0,
) -> tuple[Tensor, Result]:
    """(what the model is shown, uint8 (C, H, W); its `samples` answers) for an image uint8 (C, H, W) that is
    degraded by one of OPERATORS and by noise of the deviation `noise_std`, images being [-1, 1].

    `unknown`, bool (1, H, W), is the gap. Of "noise" the model knows that it hides the image: nothing is
    measured there. "silence" is a gap of the paper's color, which the model believes: every pixel is seen,
    with a deviation of 0.05 at least. Raises ConfigError for what does not fit together.
    """
    _check(samples, num_steps, seed)
    check_choice("method", method, METHODS)
    check_label(model.module, label)
    if not 0 <= noise_std <= 2:
        raise ConfigError(f"noise_std={noise_std}: give a deviation between 0 and 2, for images in [-1, 1].")
    x = to_float(image)[None]
    degradation = operator_of(operator, unknown, gap, noise_std)
    if isinstance(degradation, Observation) and method not in ("pigdm", "dps"):
        raise ConfigError(
            f"method={method} takes no gap of silence, which is not linear: choose pigdm or dps."
        )
    paper = gapped(x, unknown, gap, seed) if operator == "gap" and unknown is not None else x
    y = degradation(paper)
    y = y + noise_std * torch.randn(y.shape, generator=keyed_generator(seed, "measurement"))
    seen = y if isinstance(degradation, Observation) else degradation.pseudo_inverse(y)
    if operator == "gap" and unknown is not None:
        seen = torch.where(unknown, paper, seen)
    known: dict[str, Any] = {} if isinstance(degradation, Observation) else {"noise_std": noise_std}
    told = None if label is None else torch.tensor([label])
    if label is None and model.module.num_classes and not model.module.dropout["label"]:
        raise ConfigError("The model was always told a class in training: choose one.")
    with watched(model.module, samples, guidance) as (counted, filmed):
        known |= {"method": method, "num_steps": num_steps, "samples": samples, "seed": seed, "label": told}
        restored = model.restore(y, degradation, **known)[0]
        result = _result(model.module, restored, counted, filmed)
    return to_uint8(seen)[0], result


def operator_of(
    name: str, unknown: Tensor | None, gap: str, noise_std: float
) -> LinearOperator | Observation:
    """The degradation by its name, one of OPERATORS; `unknown`, bool (1, H, W), is the gap. Raises
    ConfigError where there is no gap, or nothing but the gap."""
    check_choice("operator", name, OPERATORS)
    check_choice("gap", gap, GAPS)
    if name == "gap":
        if unknown is None or not unknown.any() or unknown.all():
            raise ConfigError("Paint the gap: some pixels, and not all of them.")
        return Inpainting(~unknown) if gap == "noise" else NoisyPixels(max(noise_std, BELIEVED))
    return {
        "half the size": partial(SuperResolution, 2),
        "blur": lambda: Blur(gaussian_kernel(1.0)),
        "noise": Denoising,
        "gray": Colorization,
    }[name]()


def gapped(x: Tensor, unknown: Tensor, gap: str, seed: int) -> Tensor:
    """Images (1, C, H, W) in [-1, 1] with noise, or with the median of what is left, in the gap (1, H, W)."""
    if gap == "noise":
        filling = torch.randn(x.shape, generator=keyed_generator(seed, "gap")).mul(0.6).clamp(-1, 1)
    else:
        filling = x[:, :, ~unknown[0]].median(-1).values[..., None, None]
    return torch.where(unknown, filling, x)


def gap_of(alpha: Tensor, size: Sequence[int]) -> Tensor:
    """bool (1, H, W) of `size` of the alpha channel of what was painted, uint8 (h, w), its center cut as
    pictures are: pixels of which at least half is painted."""
    h, w = alpha.shape
    scale = min(h / size[0], w / size[1])
    rows, columns = round(size[0] * scale), round(size[1] * scale)
    top, left = (h - rows) // 2, (w - columns) // 2
    painted = (alpha[top : top + rows, left : left + columns] > 0).float()[None, None]
    return torch.nn.functional.interpolate(painted, size=tuple(size), mode="area")[0] >= 0.5


def translate(
    model: Translator, content: Tensor, first: Tensor, second: Tensor | None = None, position: float = 0.0
) -> Tensor:
    """The content, uint8 (N, C, H, W), in the class that `first`, uint8 (K, C, H, W), shows, or at `position`
    in [0, 1] on the way from its code to that of `second`: uint8 (N, C, H, W)."""
    if not 0 <= position <= 1:
        raise ConfigError(f"position={position}: the way between two classes goes from 0 to 1.")
    code = translator.class_code(model.generator, to_float(first))
    if second is not None:
        code = code.lerp(translator.class_code(model.generator, to_float(second)), position)
    return translator.translate(model.generator, to_float(content), code).cpu()


def augment(image: Tensor, boxes: Tensor | None, policy: str, *, columns: int = 6, seed: int = 0) -> Tensor:
    """The policy sheet, uint8 (3, H', W'), of an image uint8 (3, H, W) with boxes (N, 4) or None, by one of
    POLICIES. Raises ConfigError for boxes that begin outside the image, and for policies that need them."""
    check_choice("policy", policy, POLICIES)
    h, w = image.shape[-2:]
    if boxes is not None and ((boxes[:, 0] >= w) | (boxes[:, 1] >= h)).any():
        raise ConfigError(f"A box begins outside the image, which is {w} pixels wide and {h} high.")
    sub_policies = {"mosaic": [[["Mosaic", 1, 10]]], "flip_boxes": [[["FlipX_BBox", 0.5, None]]]}
    families = {"randaugment": RandAugment, "trivialaugment": TrivialAugmentWide}
    if policy in sub_policies:
        chosen = Policy(sub_policies[policy])
    else:
        chosen = families[policy]() if policy in families else Policy.load(policy)
    scale = max(1, 160 // max(h, w))
    random = keyed_generator(seed, "preview", 0)
    return policy_sheet(
        chosen, image, boxes, columns=columns, rows=4, scale=scale, largest=160, generator=random
    )


def _check(num: int, num_steps: int, seed: int) -> None:
    if not 1 <= num <= MAX_IMAGES:
        raise ConfigError(f"{num} images: give between 1 and {MAX_IMAGES}.")
    if not 1 <= num_steps <= MAX_STEPS:
        raise ConfigError(f"{num_steps} steps: give between 1 and {MAX_STEPS}.")
    if not 0 <= seed < 2**31:
        raise ConfigError(f"seed={seed}: give a number from 0 to {2**31 - 1}.")
