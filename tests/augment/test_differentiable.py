"""DiffAugment: closed forms of each part, gradients, streams."""

import pytest
import torch

from lit_gen import rng
from lit_gen.augment.differentiable import DifferentiableAugment
from lit_gen.errors import ConfigError

IMAGES = torch.rand(4, 3, 16, 16, generator=rng.keyed_generator("differentiable"))


def test_neutral_draws_are_the_identity():
    """u = .5 everywhere is no change of colour and no shift; a cut-out of 0 nothing."""
    out = DifferentiableAugment(cutout=0).apply(IMAGES, torch.full((4, 7), 0.5))
    torch.testing.assert_close(out, IMAGES)


def test_colour_moves_mean_and_spread():
    """Mean + (u - .5); deviations from the mean times (u + .5)."""
    only = DifferentiableAugment(translation=0, cutout=0)
    draws = torch.full((4, 7), 0.5)
    draws[:, 0], draws[:, 2] = 0.9, 0.1
    out = only.apply(IMAGES, draws)
    torch.testing.assert_close(out.mean((1, 2, 3)), IMAGES.mean((1, 2, 3)) + 0.4)
    torch.testing.assert_close(out.std((1, 2, 3)), IMAGES.std((1, 2, 3)) * 0.6)
    draws[:, 1] = 0.0
    grey = only.apply(IMAGES, draws)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize("u, step", [(0.0, -2), (0.5, 0), (0.999, 2)])
def test_translation_is_a_zero_filled_shift(u, step):
    draws = torch.full((4, 7), 0.5)
    draws[:, 4] = u
    out = DifferentiableAugment(color=False, cutout=0).apply(IMAGES, draws)
    expected = torch.zeros_like(IMAGES)
    expected[..., max(0, step) : 16 + min(0, step)] = IMAGES[..., max(0, -step) : 16 - max(0, step)]
    assert torch.equal(out, expected)


def test_cutout_covers_its_share():
    """Inside, exactly a quarter of the pixels of side 1/2; the others are untouched."""
    draws = torch.full((4, 7), 0.5)
    out = DifferentiableAugment(color=False, translation=0).apply(IMAGES, draws)
    assert (out == 0).sum() == IMAGES.numel() // 4
    assert torch.equal(out[out != 0], IMAGES[out != 0])


def test_gradient_flows_to_every_visible_pixel():
    augment, x = DifferentiableAugment(color=False), IMAGES.clone().requires_grad_()
    out = augment(x, rng.keyed_generator(1))
    out.sum().backward()
    assert torch.equal(x.grad.sum(), (out != 0).sum().float())
    draws = augment.draw(1, rng.keyed_generator(2))
    small = IMAGES[:1, :, :5, :5].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: DifferentiableAugment().apply(v, draws), small)


def test_streams_and_bad_values():
    augment = DifferentiableAugment()
    whole = augment.draw(4, rng.PerSample.keyed(0, range(4)))
    assert torch.equal(whole[2:], augment.draw(2, rng.PerSample.keyed(0, [2, 3])))
    with pytest.raises(ConfigError, match="cutout"):
        DifferentiableAugment(cutout=2)
