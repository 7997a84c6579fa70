"""Flips and crops: exact, keyed, and those of torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2 as official

from lit_gen.data import transforms as T
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator

SIDES = st.integers(3, 40)


def image(h: int, w: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=keyed_generator("image", h, w))


@settings(max_examples=60, deadline=None)
@given(h=SIDES, w=SIDES, size=st.integers(1, 3))
def test_center_crop_is_torchvisions(h, w, size):
    assert torch.equal(T.CenterCrop(size)(image(h, w)), official.CenterCrop(size)(image(h, w)))


def test_random_crops_reach_every_window_evenly():
    x = torch.arange(30, dtype=torch.uint8).reshape(1, 5, 6)
    seen = [int(T.RandomCrop(3)(x, keyed_generator(i))[0, 0, 0]) for i in range(2400)]
    count = np.bincount(seen, minlength=30).reshape(5, 6)
    assert (count[3:] == 0).all()
    assert (count[:, 4:] == 0).all()
    assert np.abs(count[:3, :4] - 200).max() < 5 * 200**0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_oblong_windows_and_flips_of_any_pixels(dtype):
    x = torch.arange(2 * 5 * 7).to(dtype).view(2, 5, 7)
    assert torch.equal(T.CenterCrop([3, 5])(x), x[:, 1:4, 1:6])
    crop = T.RandomCrop([3, 5])(x, keyed_generator(0))
    top, left = divmod(int(crop[0, 0, 0]), 7)
    assert torch.equal(crop, x[:, top : top + 3, left : left + 5])
    assert torch.equal(T.Flip(1.0)(x), x.flip(-1))
    batch = torch.stack([x, x])
    assert torch.equal(T.Flip(1.0).batch(batch, [keyed_generator(i) for i in range(2)]), batch.flip(-1))
    with pytest.raises(ConfigError, match="No window of 7x6 fits into an image of 7x5"):
        T.CenterCrop([6, 7])(x)


def test_flips_come_as_often_as_asked():
    x = image(4, 4)
    flips = sum(not torch.equal(T.Flip(0.3)(x, keyed_generator(i)), x) for i in range(2000))
    assert abs(flips - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5
    assert torch.equal(T.Flip(0)(x, keyed_generator(0)), x)
    assert torch.equal(T.Flip(1)(x, keyed_generator(0)), x.flip(-1))


def test_the_same_key_gives_the_same_image():
    chain = T.Compose([T.Flip(), T.RandomCrop(16)])
    x = image(30, 24)
    first = [chain(x, keyed_generator(1, i)) for i in range(8)]
    again = [chain(x, keyed_generator(1, i)) for i in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({a.numpy().tobytes() for a in first}) > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: T.Flip(1.5), "p=1.5"),
        (lambda: T.RandomCrop(0), "size=0"),
        (lambda: T.RandomCrop(9)(image(8, 10)), "No window of 9x9 fits into an image of 10x8"),
        (lambda: T.CenterCrop(9)(image(8, 10)), "No window of 9x9"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
