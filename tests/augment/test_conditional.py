"""EDM's augmentation pipe against recorded outputs, and its symmetries."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gen import rng
from lit_gen.augment import conditional
from lit_gen.augment.conditional import COLORS, PIXEL_FLIPS, ConditionalAugment
from lit_gen.errors import ConfigError

GOLDENS = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens")
SCORE = next((p for p in GOLDENS.glob("*/edm_augment.json")), GOLDENS / "score" / "edm_augment.json")


def recorded(pipe: ConditionalAugment, draws: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """`ConditionalAugment.draw`'s result from the recorded numbers: value, then coin, a transformation at a
    time."""
    numbers = iter(draws)
    out = {}
    for name in pipe.active:
        value = next(numbers)
        angle = (next(numbers) * 2 - 1) * math.pi if name == "aniso" else None
        coin = next(numbers) < getattr(pipe, name) * pipe.p
        if name in ("rotate_frac", "hue"):
            value = (value * 2 - 1) * math.pi
        if name == "translate_int":
            value = value * 2 - 1
        value = torch.where(coin, value, torch.zeros_like(value))
        two = name in ("translate_int", "translate_frac")
        out[name] = value.reshape(2, -1).T if two else value.reshape(-1)
        if name == "aniso":
            out["aniso_angle"] = torch.where(
                next(numbers) < pipe.aniso_rotate_prob, angle, torch.zeros_like(angle)
            )
    return out


@pytest.mark.parity
@pytest.mark.parametrize("name", json.loads(SCORE.read_text()) if SCORE.is_file() else [])
def test_official_outputs(name):
    info = json.loads(SCORE.read_text())[name]
    with np.load(SCORE.with_suffix(".npz")) as file:
        images = torch.from_numpy(file["images"])
        keys = sorted(k for k in file.files if k.startswith(f"{name}_draw"))
        draws = [torch.from_numpy(file[k]) for k in keys]
        out, labels = torch.from_numpy(file[f"{name}_out"]), torch.from_numpy(file[f"{name}_labels"])
    off = dict.fromkeys(("xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac"), 0)
    pipe = ConditionalAugment(**(off | info["kwargs"]))
    assert pipe.label_dim == info["label_dim"]
    ours, our_labels = pipe.apply(images, recorded(pipe, draws))
    torch.testing.assert_close(our_labels, labels, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, out, rtol=0, atol=2e-5)


def test_nothing_drawn_is_the_identity_with_zero_labels():
    """The low-pass filters make a perfect pair: without a map the resampling returns the image."""
    images = torch.randn(3, 3, 16, 16, generator=rng.keyed_generator(0))
    everything = dict.fromkeys(PIXEL_FLIPS[2:] + COLORS, 1)
    out, labels = ConditionalAugment(p=0, **everything)(images, rng.keyed_generator(1))
    assert labels.shape == (3, 19) and not labels.any()
    torch.testing.assert_close(out, images, rtol=0, atol=1e-4)


def test_quarter_turn_by_resampling_is_the_quarter_turn():
    x = torch.arange(16.0)
    images = (torch.sin(x / 5)[:, None] + torch.cos(x / 7)).expand(2, 1, 16, 16)
    off = {"p": 1, "xflip": 0, "yflip": 0, "scale": 0, "aniso": 0, "translate_frac": 0}
    out, labels = ConditionalAugment(**off).apply(images, {"rotate_frac": torch.full((2,), math.pi / 2)})
    quarter = ConditionalAugment(**off | {"rotate_frac": 0, "rotate_int": 1})
    turned, _ = quarter.apply(images, {"rotate_int": torch.ones(2, dtype=torch.long)})
    torch.testing.assert_close(out, turned, rtol=0, atol=2e-2)
    torch.testing.assert_close(labels, torch.tensor([[-1.0, 1.0]] * 2), rtol=0, atol=1e-6)


def test_one_stream_per_image():
    """With keyed streams an image's augmentation does not depend on its batch."""
    images = torch.randn(4, 3, 16, 16, generator=rng.keyed_generator(0))
    pipe = ConditionalAugment(p=0.5)
    whole = pipe.draw(4, rng.PerSample.keyed(3, range(4)))
    half = pipe.draw(2, rng.PerSample.keyed(3, [2, 3]))
    assert all(torch.equal(whole[k][2:], half[k]) for k in whole)
    assert pipe(images, rng.PerSample.keyed(3, range(4)))[1].shape == (4, pipe.label_dim) == (4, 9)


def test_autocast_changes_nothing():
    """The images, the labels and their precision are those of float32."""
    images = torch.randn(8, 3, 16, 16, generator=rng.keyed_generator(0))
    pipe = ConditionalAugment(p=0.7, **dict.fromkeys(PIXEL_FLIPS[2:] + COLORS, 1))
    draws = pipe.draw(8, rng.keyed_generator(1))
    plain = pipe.apply(images, draws)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(pipe.apply(images, draws), plain, strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    assert pipe.apply(images.bfloat16(), draws)[0].dtype == torch.float32


def test_margins_beyond_what_the_maps_reach_change_nothing(monkeypatch):
    """A GPU pads by all that can be reflected, since a look at the maps would wait for it."""
    images = torch.rand(24, 3, 20, 32, generator=rng.keyed_generator(0)) * 2 - 1
    pipe = ConditionalAugment(p=0.5)
    all_draws = [pipe.draw(24, rng.keyed_generator(k)) for k in range(3)]
    all_draws.append(pipe.draw(24) | {"scale": torch.full((24,), 0.3), "rotate_frac": torch.zeros(24)})
    for draws in all_draws:
        tight = pipe.apply(images, draws)[0]
        with monkeypatch.context() as patch:
            patch.setattr(conditional, "_margins", lambda m, h, w, extra: [w - 1, h - 1, w - 1, h - 1])
            wide = pipe.apply(images, draws)[0]
        torch.testing.assert_close(wide, tight, rtol=0, atol=1e-4)


def test_gradient_is_the_adjoint():
    """The map is linear in the images (no colour shift): <A x, y> = <x, A' y>."""
    g = rng.keyed_generator(0)
    x, y = (
        torch.randn(2, 3, 12, 12, generator=g, dtype=torch.float64),
        torch.randn(2, 3, 12, 12, dtype=torch.float64),
    )
    pipe = ConditionalAugment(p=1, translate_int=1)
    draws = pipe.draw(2, g)
    x.requires_grad_()
    out = pipe.apply(x, draws)[0]
    (back,) = torch.autograd.grad((out * y).sum(), x)
    torch.testing.assert_close((back * x).sum(), (out * y).sum())


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="uint8"):
        ConditionalAugment()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="scale"):
        ConditionalAugment(scale=-1)
    with pytest.raises(ConfigError, match="2"):
        ConditionalAugment(hue=1)(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ConfigError, match="square"):
        ConditionalAugment(rotate_int=1)(torch.zeros(1, 3, 8, 9))


def test_what_is_untold_is_done_and_not_said():
    images = torch.rand(40, 3, 8, 8, generator=rng.keyed_generator("untold"))
    every = ConditionalAugment(p=0.7, xflip=1, rotate_frac=1, hue=1)
    some = ConditionalAugment(p=0.7, xflip=1, rotate_frac=1, hue=1, untold=("xflip", "rotate_frac"))
    (a, told), (b, less) = (pipe(images, rng.keyed_generator("draws")) for pipe in (every, some))
    kept = [i for i, name in enumerate(_columns(every)) if name not in some.untold]
    assert torch.equal(a, b) and torch.equal(told[:, kept], less) and less.shape[1] == some.label_dim
    with pytest.raises(ConfigError, match="there are xflip"):
        ConditionalAugment(untold=("flip",))


def _columns(pipe: ConditionalAugment) -> list[str]:
    """The transformation that each column of the labels is of."""
    return [name for name in pipe.active for _ in range(2 if name in conditional.PAIRS else 1)]
