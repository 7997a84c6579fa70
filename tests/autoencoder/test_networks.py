"""The autoencoder's networks: their equations, and what they are built of."""

import pytest
import torch
from torch import distributions, nn

from lit_gen.autoencoder import AutoencoderKL, PatchDiscriminator
from lit_gen.autoencoder.networks import Attention, kl_divergence
from lit_gen.errors import ConfigError


def small(**options):
    torch.manual_seed(0)
    return AutoencoderKL(**{"channels": 1, "widths": (8, 16), "blocks": 1, "groups": 4} | options)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20)])
def test_latents_have_the_size_that_the_levels_say(height, width):
    net = small(widths=(8, 8, 16), latent_channels=3)
    x = torch.randn(2, 1, height, width)
    mean, deviation = net.encode(x)
    assert mean.shape == deviation.shape == (2, 3, height // 4, width // 4) and (deviation > 0).all()
    noise = torch.randn_like(mean)
    restored, *moments = net(x, noise)
    assert torch.equal(restored, net.decode(mean + deviation * noise)) and restored.shape == x.shape
    assert torch.equal(moments[0], mean) and torch.equal(moments[1], deviation)


def test_attention_is_the_mean_of_values_by_likeness():
    torch.manual_seed(0)
    block = Attention(8, 4).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    rows = block.norm(x).flatten(2).mT
    weights = (block.q(rows) @ block.k(rows).mT / 8**0.5).softmax(-1)
    expected = x + block.out(weights @ block.v(rows)).mT.unflatten(2, (3, 5))
    torch.testing.assert_close(block(x), expected)


def test_the_divergence_is_that_of_normal_distributions():
    mean, deviation = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2) + 0.1
    exact = distributions.kl_divergence(
        distributions.Normal(mean, deviation), distributions.Normal(torch.zeros(()), torch.ones(()))
    )
    torch.testing.assert_close(kl_divergence(mean, deviation), exact.sum((1, 2, 3)))


def test_what_cannot_be_built_or_halved_is_said():
    with pytest.raises(ConfigError, match=r"widths=\[8, 9\]: give at least one, all multiples of .*groups=4"):
        small(widths=(8, 9))
    for name in ("groups", "blocks", "latent_channels", "channels"):
        with pytest.raises(ConfigError, match=f"model.network.{name}=0: must be at least 1"):
            small(**{name: 0})
    for options in ({"width": 6}, {"layers": 0}):
        with pytest.raises(ConfigError, match="give a multiple of 4 and at least 1"):
            PatchDiscriminator(1, **options)
    with pytest.raises(ConfigError, match=r"7x8.*multiples of 2"):
        small().encode(torch.zeros(1, 1, 7, 8))


def test_a_discriminator_judges_images_one_by_one():
    torch.manual_seed(0)
    judge = PatchDiscriminator(1, width=8, layers=2).double()
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    said = judge(x)
    assert said.shape[:2] == (3, 1) and said.shape[2] > 1
    assert judge(x[..., : judge.smallest, : judge.smallest]).shape == (3, 1, 1, 1)
    with pytest.raises(RuntimeError):
        judge(x[..., 1 : judge.smallest, 1 : judge.smallest])
    torch.testing.assert_close(judge(x[1:2]), said[1:2])
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in judge.modules())
