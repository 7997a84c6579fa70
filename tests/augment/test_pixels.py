"""Pixel ops: their defining formulas, the repairs, and torchvision as a second opinion. (Parity with the
official code: test_parity.)"""

import inspect

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from lit_gen import rng
from lit_gen.augment import Policy, pixels
from lit_gen.augment.tables import TABLES

RAMP = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)


def random_images(n: int = 3, c: int = 3, h: int = 37, w: int = 41) -> torch.Tensor:
    noise = torch.randn(n, c, h, w, generator=rng.keyed_generator("pixels", n, c, h, w))
    return (noise * 60 + 120).clamp(0, 255).to(torch.uint8)


def test_solarize_256_is_a_no_op_and_officially_inverts():
    images = random_images()
    assert torch.equal(pixels.solarize(images, [256] * 3), images)
    assert torch.equal(pixels.solarize_official(images, [256] * 3), 255 - images)


@pytest.mark.parametrize("threshold", [0, 1, 100, 255])
def test_solarize_formula(threshold):
    v = RAMP.long()
    expected = torch.where(v < threshold, v, 255 - v)
    assert torch.equal(pixels.solarize(RAMP, [threshold]).long(), expected)
    assert torch.equal(pixels.solarize_official(RAMP, [threshold]).long(), expected)


def test_solarize_add_formula():
    v = RAMP.long()
    expected = torch.where(v < 128, (v + 88).clamp(max=255), v)
    assert torch.equal(pixels.solarize_add(RAMP, [88]).long(), expected)


@pytest.mark.parametrize("bits", [0, 1, 3, 8])
def test_posterize_keeps_at_least_one_bit(bits):
    expected = RAMP.long() // 2 ** (8 - max(1, bits)) * 2 ** (8 - max(1, bits))
    assert torch.equal(pixels.posterize(RAMP, [bits]).long(), expected)


def test_contrast_target_is_the_mean_and_officially_the_area():
    """A flat image is its own mean; officially it is pulled to H W / 256."""
    flat = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert torch.equal(pixels.contrast(flat, [0.1]), flat)
    assert (pixels.contrast_official(flat, [0.1]) == 13).all()
    images = random_images(1)
    assert torch.equal(pixels.contrast(images, [1.0]), images)


def test_flat_areas_survive_sharpness_and_officially_52_values_do_not():
    flat = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 5, 5)
    assert torch.equal(pixels.sharpness(flat, [0.1] * 256), flat)
    lost = (pixels.sharpness_official(flat, [0.0] * 256) != flat).flatten(1).any(1)
    assert lost.sum() == 52


def test_smoothing_is_exact_rounding():
    images = random_images(2)
    wide = torch.nn.functional.unfold(images.double(), 3).view(2, 3, 9, -1)
    total = wide.sum(2) + 4 * wide[:, :, 4]
    expected = (total.long() + 6) // 13
    assert torch.equal(pixels.sharpness(images, [0.0, 0.0])[..., 1:-1, 1:-1].flatten(2).long(), expected)


@pytest.mark.parametrize("op", ["equalize", "autocontrast", "invert"])
def test_same_as_torchvision(op):
    images = random_images(5)
    images[0] = images[0] // 8 + 90
    images[1] = 77  # flat: unchanged
    ours, theirs = getattr(pixels, op)(images, [0] * 5), getattr(F, op)(images)
    assert (ours.int() - theirs.int()).abs().max() <= (1 if op == "autocontrast" else 0)


@pytest.mark.parametrize("factor", [0.1, 0.64, 1.0, 1.9])
def test_close_to_torchvision(factor):
    """torchvision rounds greys and means differently: never by more than 1 grey, times the factor."""
    images = random_images(4)
    pairs = {"brightness": F.adjust_brightness, "contrast": F.adjust_contrast, "color": F.adjust_saturation}
    pairs["sharpness"] = F.adjust_sharpness
    for name, theirs in pairs.items():
        difference = (getattr(pixels, name)(images, [factor] * 4).int() - theirs(images, factor).int()).abs()
        assert difference.max() <= (0 if name == "brightness" else 1 + abs(1 - factor)), name


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3), (300, 410)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_its_images(size, channels):
    """Every op, per-image magnitudes: the batch, image by image, also where tiles and paired tables come
    in."""
    images = random_images(2, channels, *size)
    magnitudes = {
        "posterize": [3, 5],
        "solarize": [20, 200],
        "solarize_add": [10, 90],
        "solarize_official": [256, 9],
    }
    functions = inspect.getmembers(pixels, inspect.isfunction)
    ops = {n: f for n, f in functions if f.__module__ == pixels.__name__ and n[0] != "_" and n != "lookup"}
    assert len(ops) == 15
    for name, op in ops.items():
        m = magnitudes.get(name, [0.4, 1.7])
        whole = op(images, m)
        assert whole.dtype == torch.uint8 and whole.shape == images.shape
        for i in range(2):
            assert torch.equal(whole[i], op(images[i : i + 1].clone(), m[i : i + 1])[0]), name


@pytest.mark.parametrize("side", [20, 80])
def test_lookup(side):
    """Small images by gather, large ones by translation of bytes; not contiguous ones too."""
    images = random_images(2, 3, side, side + 2)
    table = rng.keyed_generator(0)
    table = torch.randint(0, 256, (2, 3, 256), dtype=torch.uint8, generator=table).numpy()
    pairs = zip(images.numpy(), table, strict=True)
    expected = np.stack([[t[p] for p, t in zip(x, y, strict=True)] for x, y in pairs])
    assert np.array_equal(pixels.lookup(images, table), expected)
    assert np.array_equal(pixels.lookup(images[..., :-1], table), expected[..., :-1])


@pytest.mark.parametrize("table", ["detection", "classification"])
@pytest.mark.parametrize("side", [16, 80])
def test_memory_layout_does_not_matter(table, side):
    """A picture of PIL's is (H, W, C) in memory: every op does to it what it does to a contiguous one."""
    g = rng.keyed_generator(0)
    image = torch.randint(0, 256, (side, side + 3, 3), dtype=torch.uint8, generator=g).permute(2, 0, 1)
    boxes = torch.tensor([[1.0, 2.0, 12.0, 13.0]])
    for name in TABLES[table]:
        if TABLES[table][name].partners:  # wants a batch
            continue
        policy = Policy([[[name, 1.0, 7]]], table)
        draws = policy.sample(1, rng.keyed_generator(1))
        a, b = policy.apply(image, boxes, draws), policy.apply(image.contiguous(), boxes, draws)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]), name
