"""Few-shot classification with translations as training images (Liu et al. 2019, section 4 and appendix,
https://arxiv.org/abs/1905.01723).

Unseen classes are shown by one real image each. Source images, translated into each class, are added to it; a
linear head on features that were trained on the source classes alone is fitted to both and tested on real
images of the unseen classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_gen.errors import ConfigError
from lit_gen.funit.classifier import fit_head
from lit_gen.funit.evaluation import Translator
from lit_gen.images import to_float
from lit_gen.rng import keyed_generator


@torch.no_grad()
def generated_set(
    translate: Translator,
    shown: dict[str, Tensor],
    contents: Tensor,
    num: int,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """`num` translations into each class: uint8 (T num, C, H, W) and their class numbers (T num,), in the
    order of `shown`.

    The contents of class t are drawn from `contents` (N, C, H, W) without repetition by (seed, class name).
    Raises ConfigError if there are fewer than `num`.
    """
    if not 1 <= num <= len(contents):
        raise ConfigError(f"num={num}: choose 1 to the {len(contents)} content images that there are.")
    images = []
    for name, examples in shown.items():
        order = torch.randperm(len(contents), generator=keyed_generator(seed, "few-shot contents", name))
        for rows in order[:num].split(batch_size):
            images.append(translate(to_float(contents[rows]), to_float(examples)).cpu())
    return torch.cat(images), torch.arange(len(shown)).repeat_interleave(num)


@torch.no_grad()
def few_shot_accuracy(
    features: Callable[[Tensor], Tensor],
    shown: dict[str, Tensor],
    test_images: Tensor,
    test_labels: Tensor,
    generated: tuple[Tensor, Tensor] | None = None,
    weight_decay: float = 1e-3,
    batch_size: int = 256,
) -> float:
    """Share of test images (M, C, H, W) whose class (M,), a place in `shown` {name: (K, C, H, W)}, the fitted
    head finds.

    `features` takes uint8 images to (N, D). `generated` is `generated_set`'s; without it the head knows the
    real images only.
    """
    images = torch.cat(list(shown.values()))
    labels = torch.arange(len(shown)).repeat_interleave(torch.tensor([len(x) for x in shown.values()]))
    if generated is not None:
        images, labels = torch.cat([images, generated[0]]), torch.cat([labels, generated[1]])
    known, unknown = (
        torch.cat([features(b).cpu() for b in x.split(batch_size)]) for x in (images, test_images)
    )
    with torch.enable_grad():
        head = fit_head(known, labels, len(shown), weight_decay=weight_decay)
    return (head(unknown).argmax(1) == test_labels.cpu()).double().mean().item()
