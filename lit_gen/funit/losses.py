"""The losses of FUNIT (Liu et al. 2019, eq. 3-6, https://arxiv.org/abs/1905.01723).

Each returns (loss, its named parts); parts are detached scalars, to be logged. Logits are (B, h, w), one
judgment per patch, of the class that the image should belong to; features are (B, C, h, w); losses are means
over all of it, taken in float32 or wider whatever the networks' precision.
"""

import torch
from torch import Tensor

Parts = dict[str, Tensor]


def _wide(x: Tensor) -> Tensor:
    """bfloat16 has three digits: too few for a mean."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fraction(true: Tensor, like: Tensor) -> Tensor:
    return true.to(like.dtype).mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Parts]:
    """mean max(0, 1 - D(x)) + mean max(0, 1 + D(G)).

    The part `accuracy` is the fraction of patches classified correctly, over both halves.
    """
    real, fake = _wide(real), _wide(fake)
    loss_real, loss_fake = (1 - real).relu().mean(), (1 + fake).relu().mean()
    accuracy = (_fraction(real >= 0, real) + _fraction(fake < 0, fake)) / 2
    parts = {"real": loss_real.detach(), "fake": loss_fake.detach(), "accuracy": accuracy}
    return loss_real + loss_fake, parts


def hinge_generator(translated: Tensor, reconstructed: Tensor) -> tuple[Tensor, Parts]:
    """-(mean D(translation) + mean D(reconstruction)) / 2; `fooled`: the fraction of patches that pass."""
    translated, reconstructed = _wide(translated), _wide(reconstructed)
    loss = -(translated.mean() + reconstructed.mean()) / 2
    fooled = (_fraction(translated >= 0, translated) + _fraction(reconstructed >= 0, reconstructed)) / 2
    return loss, {"adversarial": loss.detach(), "fooled": fooled}


def reconstruction(image: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
    """mean |image - target|, the content image translated into its own class (eq. 5)."""
    loss = _wide(image - target).abs().mean()
    return loss, {"reconstruction": loss.detach()}


def content_consistency(code: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
    """mean |code of a translation - code of its content image|, which FUNIT does not have.

    The latent reconstruction of MUNIT (Huang et al. 2018, eq. 3, https://arxiv.org/abs/1804.04732) for the
    content alone. `target` is taken as it is, so that no content is lost to make the codes agree.
    """
    loss = _wide(code - target.detach()).abs().mean()
    return loss, {"content_codes": loss.detach()}


def feature_matching(
    translated: Tensor, classes: Tensor, reconstructed: Tensor, content: Tensor
) -> tuple[Tensor, Parts]:
    """mean |.| between the features averaged over places, of G and of real images (eq. 6).

    The translation is held against the class image; the official code adds the reconstruction against the
    content image.
    """
    means = [_wide(features).mean((2, 3)) for features in (translated, classes, reconstructed, content)]
    to_class, to_content = (means[0] - means[1]).abs().mean(), (means[2] - means[3]).abs().mean()
    parts = {"class_features": to_class.detach(), "content_features": to_content.detach()}
    return to_class + to_content, parts


def squared_gradients(logits: Tensor, images: Tensor) -> Tensor:
    """||d mean_hw D(x_i) / d x_i||^2 for each image: (B,). `images` must require gradients and `logits` come
    from them.
    """
    per_image = _wide(logits).mean((1, 2)).sum()
    (gradient,) = torch.autograd.grad(per_image, images, create_graph=True)
    return gradient.square().sum((1, 2, 3))


def gradient_penalty(logits: Tensor, images: Tensor, weight: float = 10 / 64) -> tuple[Tensor, Parts]:
    """weight * mean_i ||d mean_hw D(x_i) / d x_i||^2 on real images, the same whatever the batch size.

    R1 of Mescheder et al. 2018, eq. 9, https://arxiv.org/abs/1801.04406 (without the half). The default
    weight is what the official run amounts to: 10 on batches of 8 per GPU, see `official_gradient_penalty`.
    """
    penalty = squared_gradients(logits, images).mean()
    return weight * penalty, {"penalty": penalty.detach(), "penalty_weight": torch.full_like(penalty, weight)}


def official_gradient_penalty(logits: Tensor, images: Tensor, weight: float = 10.0) -> tuple[Tensor, Parts]:
    """The official form: the gradient of the mean over patches and batch, its square summed over pixels and
    averaged over images.

    This is `gradient_penalty` / B^2, so the strength depends on the batch of one process: 10 weighs 0.156 at
    B = 8 and 0.0024 at B = 64. The part `penalty_weight` says what it amounts to; `penalty` is the official
    figure.
    """
    scale = 1 / len(images) ** 2
    penalty = squared_gradients(logits, images).mean() * scale
    parts = {"penalty": penalty.detach(), "penalty_weight": torch.full_like(penalty, weight * scale)}
    return weight * penalty, parts
