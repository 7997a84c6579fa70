"""How images are stored, and what a model and a person see of them."""

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.images import BYTES, Pixels, grid, height_and_width, to_float, to_uint8


@pytest.mark.parametrize(
    ("pixels", "values"),
    [
        (BYTES, torch.arange(256)),
        (Pixels("uint16"), torch.arange(65536)),
        (Pixels("uint16", [0, 4095]), torch.arange(4096)),
        (Pixels("uint8", [16, 235]), torch.arange(16, 236)),
    ],
)
def test_every_integer_comes_back_from_the_model(pixels, values):
    stored = values.to(pixels.torch_dtype)
    model = pixels.to_model(stored)
    assert (float(model.min()), float(model.max())) == (-1, 1)
    assert torch.equal(pixels.from_model(model), stored)


def test_bytes_are_rounded_as_edm_does():
    x = 1.5 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(BYTES.from_model(x), (x * 127.5 + 128).clamp(0, 255).to(torch.uint8))
    assert torch.equal(to_uint8(x), BYTES.from_model(x))
    b = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_float(b), b.float() / 127.5 - 1)


def test_floats_are_neither_clamped_nor_rounded():
    pixels = Pixels("float32", [-2, 6])
    model = torch.tensor([-1.25, -1.0, 0.0, 0.5, 1.5])
    assert torch.equal(pixels.from_model(model), torch.tensor([-3.0, -2.0, 2.0, 4.0, 8.0]))
    assert torch.equal(pixels.to_model(pixels.from_model(model)), model)
    assert pixels.to_uint8(pixels.from_model(model)).tolist() == [0, 0, 128, 191, 255]


def test_halves_are_the_nearest_to_the_models_floats():
    pixels, x = Pixels("float16", [-2, 6]), torch.linspace(-1.5, 1.5, 99)
    stored = pixels.from_model(x)
    assert stored.dtype == torch.float16 and pixels.levels is None
    assert torch.equal(stored, Pixels("float32", [-2, 6]).from_model(x).half())
    torch.testing.assert_close(pixels.to_model(stored), x, rtol=1e-3, atol=1e-3)


def test_a_picture_shows_one_channel_or_three():
    images = torch.arange(5).to(torch.uint8)[None, :, None, None].expand(2, 5, 4, 6)
    shown = {n: Pixels().picture(images[:, :n])[0, :, 0, 0].tolist() for n in (1, 2, 3, 5)}
    assert shown == {1: [0], 2: [0], 3: [0, 1, 2], 5: [0, 1, 2]}
    assert Pixels(shown=[4, 2, 1]).picture(images)[0, :, 0, 0].tolist() == [4, 2, 1]
    assert grid(images, columns=1, pad=0, scale=2).shape == (3, 16, 12)
    with pytest.raises(ConfigError, match=r"data.shown=\[7\]: the images have the channels 0 to 4"):
        Pixels(shown=[7]).picture(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "data.dtype=float64"),
        ({"dtype": "float32"}, r"needs the range of the values, data.range=\[0,1\]"),
        ({"dtype": "float32", "range": [1, 1]}, r"data.range=\[1, 1\]"),
        ({"dtype": "float32", "range": [0, float("inf")]}, "data.range="),
        ({"range": [0, 256]}, r"data.range=\[0, 256\]: give the lowest and the highest value of uint8"),
        ({"dtype": "uint16", "range": [0, 0.5]}, "data.range="),
        ({"shown": [0, 1]}, r"data.shown=\[0, 1\]: a picture shows one channel or three"),
    ],
)
def test_ranges_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Pixels(**options)


def test_values_out_of_the_range_are_named():
    pixels = Pixels("float32", [0, 1])
    pixels.check(torch.tensor([0.0, 1.0]), "a.npy")
    with pytest.raises(ConfigError, match=r"a.npy: 1 of its 2 values are NaN or infinite"):
        pixels.check(torch.tensor([0.0, float("nan")]), "a.npy")
    with pytest.raises(
        ConfigError, match=r"a.npy: its values go from -0.5 to 3 and leave data.range=\[0,1\]"
    ):
        pixels.check(torch.tensor([-0.5, 3.0]), "a.npy")
    with pytest.raises(ConfigError, match=r"its pixels are uint8, not float32: set data.dtype=uint8"):
        pixels.check(torch.zeros(2, dtype=torch.uint8), "a.npy")
    with pytest.raises(ConfigError, match=r"from 0 to 300 and leave data.range=\[0,255\]"):
        Pixels("uint16", [0, 255]).check(torch.tensor([0, 300]).to(torch.uint16), "a.npy")


def test_image_sizes():
    assert (height_and_width(64), height_and_width([48, 64])) == ((64, 64), (48, 64))
    for wrong in (0, [48], [48, 64, 3], [48, 0], "64"):
        with pytest.raises(ConfigError, match="give one number of pixels, or"):
            height_and_width(wrong)
