"""The embedded networks: what they know, what they accept, and how their numbers are named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_gen.data.digits import digits as load
from lit_gen.errors import ConfigError
from lit_gen.images import Pixels
from lit_gen.metrics import (
    Extractor,
    ExtractorId,
    digits64,
    digits_classifier,
    frechet_distance,
    moments,
    own_extractor,
    pixel_means,
)


@pytest.fixture(scope="module")
def digits():
    """Train and test images, train and test labels: the split that the embedded networks were trained on."""
    train, test = load("train"), load("test")
    return train.images, test.images, train.labels, test.labels


def test_the_classifier_reads_held_out_digits(digits):
    _, test, _, labels = digits
    probabilities = digits_classifier().with_logits(test)[1].softmax(-1)
    assert (probabilities.argmax(-1) == labels).float().mean() >= 0.97
    assert (probabilities.amax(-1) > 0.9).float().mean() >= 0.98


def test_a_network_of_ones_own_sees_what_is_stored(tmp_path):
    """Every channel and value, in [-1, 1] by the range; the weights are part of the name."""
    network = nn.Sequential(nn.Conv2d(5, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    other = nn.Sequential(nn.Conv2d(5, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    extractor = own_extractor(other, 3, 5, str(tmp_path / "weights.pt"), "mine")
    pixels = Pixels("float32", [0, 4])
    images = 4 * torch.rand(6, 5, 3, 4)
    expected = network(images / 2 - 1)
    torch.testing.assert_close(extractor.reading(pixels, 5)(images), expected.detach(), rtol=1e-5, atol=1e-5)
    fresh = own_extractor(nn.Sequential(nn.Conv2d(5, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, 5)
    assert fresh.id.sha256 != extractor.id.sha256 and extractor.id.key("fd", 9).startswith("fd_mine_")
    with pytest.raises(ConfigError, match=r"The images have 2 channels, mine takes 5 channels"):
        extractor.reading(pixels, 2)
    with pytest.raises(ConfigError, match=r"weights=.*none.pt cannot be loaded"):
        own_extractor(other, 3, 5, str(tmp_path / "none.pt"))


def test_means_of_regions_of_every_channel():
    images = torch.arange(2 * 8 * 4, dtype=torch.float32).view(1, 2, 8, 4)
    features = pixel_means(2, 4).reading(Pixels("float32", [0, 64]), 2)(images)
    means = images.view(1, 2, 4, 2, 4).mean(3).flatten(1)
    torch.testing.assert_close(features, means / 32 - 1)


def test_pictures_of_16_bits_are_seen_as_bytes(digits):
    train, *_ = digits
    stored = (train[:8].to(torch.int32) * 257).to(torch.uint16)
    extractor = digits64()
    assert torch.equal(extractor.reading(Pixels("uint16"), 1)(stored), extractor(train[:8]))


def test_features_are_of_order_one(digits):
    train, test, *_ = digits
    reference, held_out = (moments(digits64()(x)) for x in (train, test))
    assert float(reference.cov.trace()) == pytest.approx(1, abs=1e-3)
    assert 0 < frechet_distance(held_out, reference) < 0.1


def test_corruption_and_lost_classes_raise_the_distance(digits):
    train, test, labels, _ = digits
    extractor = digits64()
    reference = moments(extractor(test))
    floor = frechet_distance(reference, moments(extractor(train)))
    g = torch.Generator().manual_seed(0)

    def ratio(images):
        return frechet_distance(reference, moments(extractor(images))) / floor

    noise = torch.randn(train.shape, generator=g)
    noisy = [(train + 255 * s * noise).clamp(0, 255).to(torch.uint8) for s in (0.05, 0.1, 0.2, 0.4)]
    ladder = [ratio(x) for x in noisy]
    assert ladder == sorted(ladder) and ladder[1] > 1.5 and ladder[-1] > 10
    assert ratio(train[labels < 5]) > 5
    blend = ((train.float() + train.roll(1, 0)) / 2).to(torch.uint8)
    assert ratio(blend) > 5


def test_an_image_s_features_do_not_depend_on_its_batch(digits):
    train, *_ = digits
    together, alone = digits64()(train[:64]), torch.cat([digits64()(x[None]) for x in train[:64]])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_other_sizes_and_colour_are_brought_to_the_network_s(digits):
    train, *_ = digits
    extractor, x = digits64(), train[:8]
    assert torch.equal(extractor(x.expand(-1, 3, -1, -1)), extractor(x))
    large = F.interpolate(x.float(), scale_factor=4).to(
        torch.uint8
    )  # every pixel four times: the mean is the pixel
    assert F.cosine_similarity(extractor(large), extractor(x)).min() > 0.95
    assert extractor(x[:0]).shape == (0, 64)


class Watch(nn.Module):
    def forward(self, x):
        self.seen = [backend.fp32_precision for backend in BACKENDS]
        self.seen += [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark]
        self.seen += [torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), x.dtype]
        return x.flatten(1), None


BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
BACKENDS += (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)


@pytest.mark.parametrize("switch", ["old", "new"])
def test_the_network_runs_in_full_float32_whatever_the_trainer_set(switch):
    watch = Watch()
    extractor = Extractor(ExtractorId("watch", "1", "0" * 64, "none", "pixels", 64), watch, channels=1)
    defaults = [backend.fp32_precision for backend in BACKENDS]
    try:
        if switch == "old":
            torch.set_float32_matmul_precision("medium")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        chosen = [backend.fp32_precision for backend in BACKENDS]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
        assert watch.seen == ["ieee"] * 4 + [True, False, False, True, torch.float32]
        assert [backend.fp32_precision for backend in BACKENDS] == chosen != ["ieee"] * 4
        if switch == "old":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        if switch == "old":
            torch.set_float32_matmul_precision("highest")
        for backend, value in zip(BACKENDS, defaults, strict=True):
            backend.fp32_precision = value
    assert torch.get_float32_matmul_precision() == "highest" and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
    ],
    ids=["float", "four channels", "no batch"],
)
def test_other_input_is_refused(images):
    with pytest.raises(ConfigError, match="uint8 images"):
        digits64()(images)


def test_names_carry_the_weights(digits):
    id = digits64().id
    assert id.key("fd", 1437) == f"fd_digits64_{id.sha256[:8]}_n1437"
    assert len(id.sha256) == 64 and id.d == 64
    assert digits_classifier().id.sha256 != id.sha256
