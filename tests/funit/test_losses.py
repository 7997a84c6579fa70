"""Losses against closed forms."""

import pytest
import torch

from lit_gen.funit import losses


def test_hinge():
    real = torch.tensor([[[2.0, 0.5], [0.0, -1.0]]])
    fake = torch.tensor([[[-2.0, -0.5], [0.0, 1.0]]])
    loss, parts = losses.hinge_discriminator(real, fake)
    assert parts["real"] == (0 + 0.5 + 1 + 2) / 4
    assert parts["fake"] == (0 + 0.5 + 1 + 2) / 4
    assert loss == parts["real"] + parts["fake"]
    assert parts["accuracy"] == (3 / 4 + 2 / 4) / 2  # zero counts as "real"
    loss, parts = losses.hinge_generator(real, 3 * fake)
    assert loss == parts["adversarial"] == -(1.5 / 4 - 4.5 / 4) / 2
    assert parts["fooled"] == (3 / 4 + 2 / 4) / 2


def test_precision_of_what_is_logged():
    """Shares are exact in float64; bfloat16's eight bits are not those of a mean over many patches."""
    wide = torch.tensor([[[1.0, 1.0, -1.0]]], dtype=torch.float64)
    assert losses.hinge_discriminator(wide, -wide)[1]["accuracy"].item() == 2 / 3
    assert losses.hinge_generator(wide, wide)[1]["fooled"].item() == 2 / 3
    logits = torch.linspace(-3, 3, 1001).view(1, 7, 143).bfloat16()
    loss, _ = losses.hinge_generator(logits, logits + 1)
    expected = -(logits.double().mean() + (logits + 1).double().mean()) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    shapes = torch.rand(4, 2, 3, 16, 16).bfloat16()
    means = shapes.double().mean((3, 4))
    loss, _ = losses.feature_matching(*shapes)
    matched = (means[0] - means[1]).abs().mean() + (means[2] - means[3]).abs().mean()
    assert loss.item() == pytest.approx(matched.item(), rel=1e-5)


def test_reconstruction_and_feature_matching():
    x = torch.randn(2, 3, 4, 4)
    assert losses.reconstruction(x + 0.5, x)[0].item() == pytest.approx(0.5, rel=1e-6)
    # Means over places are compared: shuffling the places changes nothing, a shift by 2 costs 2.
    shuffled = x.flatten(2)[..., torch.randperm(16)].view_as(x)
    loss, parts = losses.feature_matching(shuffled, x, x + 2, shuffled)
    assert parts["class_features"].item() == pytest.approx(0, abs=1e-6)
    assert parts["content_features"].item() == pytest.approx(2, rel=1e-5)
    assert loss.item() == pytest.approx(2, rel=1e-5)


def quadratic(images: torch.Tensor) -> torch.Tensor:
    """A discriminator with a known gradient: logits (x_i . x_i) / 2 in both of its two patches."""
    return (images.square().sum((1, 2, 3)) / 2).view(-1, 1, 1).expand(-1, 1, 2)


def test_gradient_penalty_is_the_squared_gradient():
    """d mean_hw D / dx = x for that discriminator, so the penalty is the mean square norm of the images."""
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    norms = images.detach().square().sum((1, 2, 3))
    torch.testing.assert_close(losses.squared_gradients(quadratic(images), images).detach(), norms)
    loss, parts = losses.gradient_penalty(quadratic(images), images, weight=0.7)
    torch.testing.assert_close(parts["penalty"], norms.mean())
    torch.testing.assert_close(loss.detach(), 0.7 * norms.mean())
    assert parts["penalty_weight"].item() == pytest.approx(0.7)
    # It can be differentiated again: d/dx mean_i ||x_i||^2 = 2 x / B.
    (gradient,) = torch.autograd.grad(loss, images)
    torch.testing.assert_close(gradient, 0.7 * 2 * images.detach() / 4)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_official_penalty_depends_on_the_batch(batch):
    """10 times the official form weighs 10 / B^2; at the official 8 per GPU that is our default."""
    images = torch.randn(batch, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    # As its code says it: gradient of the mean over batch and patches, squares summed, over the batch size.
    (gradient,) = torch.autograd.grad(quadratic(images).mean(), images)
    as_written = gradient.square().sum() / batch
    loss, parts = losses.official_gradient_penalty(quadratic(images), images)
    torch.testing.assert_close(loss.detach(), 10 * as_written)
    torch.testing.assert_close(parts["penalty"], as_written)
    ours, _same = losses.gradient_penalty(quadratic(images), images, weight=parts["penalty_weight"].item())
    torch.testing.assert_close(ours, loss)
    if batch == 8:
        torch.testing.assert_close(losses.gradient_penalty(quadratic(images), images)[0], loss)
