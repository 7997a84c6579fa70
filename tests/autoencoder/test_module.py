"""AutoencoderModule: one step of both networks, by one optimizer."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_gen.autoencoder import AutoencoderKL, PatchDiscriminator
from lit_gen.autoencoder.module import AutoencoderModule
from lit_gen.autoencoder.networks import kl_divergence
from lit_gen.data.images import TensorImages
from lit_gen.errors import ConfigError
from lit_gen.metrics.restored import PerceptualLoss


def module(**options):
    torch.manual_seed(0)
    network = AutoencoderKL(1, 2, (8, 16), 1, 4)
    options = {"image_shape": (1, 16, 16), "optimizer": partial(torch.optim.SGD, lr=1.0)} | options
    return AutoencoderModule(network, **options)


def step(made, x):
    """(loss, its parts) of the first batch."""
    seen = {}
    made._trainer = None
    made.whole_batch = lambda images: images
    made.log_step = lambda loss, **parts: seen.update(parts)
    return made.training_step({"image": x}, 0), seen


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_the_loss_is_its_parts(reconstruction):
    made = module(reconstruction=reconstruction, kl_weight=0.01)
    x = torch.rand(4, 1, 16, 16) * 2 - 1
    loss, _ = step(made, x)
    noise = torch.randn(4, 2, 8, 8, generator=made.step_generator("latents"))
    restored, mean, deviation = made.network(x, noise)
    difference = restored - x
    distance = (difference.abs() if reconstruction == "l1" else difference.square()).mean()
    expected = distance + 0.01 * kl_divergence(mean, deviation).mean() / 256
    torch.testing.assert_close(loss, expected)
    validation = made.validation_loss({"image": x})
    own = made.network.decode(made.network.encode(x)[0]) - x
    own = own.abs() if reconstruction == "l1" else own.square()
    torch.testing.assert_close(validation, own.flatten(1).mean(1))


@pytest.mark.parametrize("start", [0, 5])
def test_each_network_has_the_gradient_of_its_own_loss(start):
    """That of the hinge loss for the discriminator, of all else for the autoencoder, before and from
    `adversarial_start` on, with one backward pass."""
    judge = PatchDiscriminator(1, width=8, layers=1)
    made = module(discriminator=judge, adversarial_weight=0.5, adversarial_start=start, kl_weight=0.0)
    x = torch.rand(4, 1, 16, 16) * 2 - 1
    loss, parts = step(made, x)
    loss.backward()
    together = {name: p.grad.clone() for name, p in made.named_parameters()}
    noise = torch.randn(4, 2, 8, 8, generator=made.step_generator("latents"))
    restored = made.network(x, noise)[0]
    of_autoencoder = (restored - x).abs().mean() - (0 if start else 0.5) * judge(restored).mean()
    names, own = zip(*made.network.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(of_autoencoder, own), strict=True):
        torch.testing.assert_close(together[f"network.{name}"], gradient)
    fake = restored.detach()
    hinge = (F.relu(1 - judge(x)).mean() + F.relu(1 + judge(fake)).mean()) / 2
    names, own = zip(*judge.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(hinge, own), strict=True):
        torch.testing.assert_close(together[f"discriminator.{name}"], gradient)
    torch.testing.assert_close(parts["discriminator"], hinge)


def test_a_perceptual_distance_is_added_and_loaded_when_a_training_begins(tmp_path):
    class Mean:
        loaded = False

        def load(self, device):
            self.loaded = True

        def __call__(self, images, originals):
            return (images - originals).mean((1, 2, 3)).square()

    made = module(perceptual=Mean(), perceptual_weight=3.0, kl_weight=0.0)
    x = torch.rand(4, 1, 16, 16)
    loss, parts = step(made, x)
    torch.testing.assert_close(loss, parts["reconstruction"] + 3 * parts["perceptual"])
    missing = PerceptualLoss(str(tmp_path / "alexnet.pth"))
    with pytest.raises(ConfigError, match=r"alexnet.pth: there is no such file.*model.perceptual=null"):
        missing.load(torch.device("cpu"))
    with pytest.raises(ConfigError, match="31 pixels or more"):
        missing(x, x)


def test_perceptual_loss_is_differentiated(monkeypatch, tmp_path):
    """With a stand-in for the network that the file would give."""
    from lit_gen.metrics import restored

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, a, b):
            assert a.shape[1] == 3  # gray counts as color
            return self.weight * (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(restored, "_lpips", lambda path: type("Metric", (), {"net": Network()}))
    (tmp_path / "alexnet.pth").touch()
    loss = PerceptualLoss(str(tmp_path / "alexnet.pth"))
    loss.load(torch.device("cpu"))
    x = torch.randn(2, 1, 32, 32, requires_grad=True)
    value = loss(x, torch.zeros(2, 1, 32, 32))
    torch.testing.assert_close(value, x.square().mean((1, 2, 3)))
    value.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() / 1024)


def test_samples_are_reconstructions_of_test_images():
    made = module()
    images = TensorImages(torch.randint(256, (5, 1, 16, 16), dtype=torch.uint8))
    with pytest.raises(ConfigError, match="none are known"):
        made.sample([0])
    made.image_source = type("Data", (), {"dataset": staticmethod(lambda split: images)})()
    x = made.pixels.to_model(images.images[[4, 0]])
    expected = made.pixels.from_model(made.network.decode(made.network.encode(x)[0]))
    for seed in (0, 1):
        assert torch.equal(made.sample([4, 5], seed), expected)
    pair = made.sample_trajectory([4, 5])
    assert torch.equal(pair[:, 0], images.images[[4, 0]]) and torch.equal(pair[:, 1], expected)
    assert made.sample([]).shape == (0, 1, 16, 16)
    with pytest.raises(ConfigError, match="leave sampler out"):
        made.check(lambda *_: None)


def test_options_are_checked():
    for options, words in (
        ({"reconstruction": "l3"}, "model.reconstruction='l3': must be one of l1, l2"),
        ({"kl_weight": -1.0}, "model.kl_weight=-1.0: cannot be negative"),
        ({"perceptual_weight": -1.0}, "model.perceptual_weight=-1.0: cannot be negative"),
        ({"adversarial_start": -1}, "model.adversarial_start=-1: cannot be negative"),
        ({"image_shape": (3, 16, 16)}, "model.network.channels=1: the images have 3"),
        ({"discriminator": PatchDiscriminator(3, 8)}, "model.discriminator.channels=3: the images have 1"),
        ({"discriminator": PatchDiscriminator(1, 8)}, "16x16 leave nothing to judge; from 24 pixels"),
        ({"image_shape": (1, 15, 16)}, "15x16.*multiples of 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            module(**options)
