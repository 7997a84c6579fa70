"""Arrays in files: kept exactly, and refused by name before a training begins."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lit_gen.data.arrays import ArrayImages, read_array
from lit_gen.data.decode import decode, fit_to
from lit_gen.data.folders import ImageFiles
from lit_gen.data.images import pixels_of, shape_of
from lit_gen.errors import ConfigError
from lit_gen.images import Pixels

UNIT = {"dtype": "float32", "range": [0, 1]}


def array(seed: int, shape=(6, 8, 5), dtype="float32") -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.random(shape, dtype=np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def bytes_of(write, value) -> bytes:
    file = io.BytesIO()
    write(file, value)
    return file.getvalue()


def tiff(file, value):
    pytest.importorskip("tifffile").imwrite(file, value)


def png(file, value):
    Image.fromarray(value).save(file, "PNG")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    ("ending", "write"),
    [("npy", np.save), ("npz", lambda f, x: np.savez_compressed(f, x)), ("tif", tiff)],
)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_values_are_those_of_the_file(dtype, ending, write, channels):
    pixels = Pixels(dtype, [0, 1] if dtype == "float32" else None)
    value = array(0, (6, 8, channels), dtype)
    image = read_array(bytes_of(write, value), f"a.{ending}", pixels, channels)
    assert np.array_equal(image.numpy(), value.transpose(2, 0, 1))
    assert image.dtype == pixels.torch_dtype and image.is_contiguous()


def test_16_bit_png_and_gray_and_channels_first():
    gray = array(0, (6, 8), "uint16")
    image = read_array(bytes_of(png, gray), "a.png", Pixels("uint16"), 1)
    assert np.array_equal(image.numpy(), gray[None])
    first = array(1, (5, 6, 8))
    assert np.array_equal(read_array(bytes_of(np.save, first), "a.npy", Pixels(**UNIT), 5).numpy(), first)
    big_endian = first.astype(">f4")
    assert np.array_equal(read_array(bytes_of(np.save, big_endian), "a.npy", Pixels(**UNIT), 5), first)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.npy", array(0, (6, 8, 4)), r"a.npy: its shape is \(6, 8, 4\), neither \(height, width, 5\)"),
        ("a.npy", array(0).astype("float64"), "a.npy: its pixels are float64, not float32"),
        (
            "a.npy",
            array(0, dtype="uint16"),
            "a.npy: its pixels are uint16, not float32: set data.dtype=uint16",
        ),
        ("a.npy", np.full((6, 8, 5), np.nan, np.float32), "a.npy: 240 of its 240 values are NaN"),
        ("a.npy", array(0) * 3, r"a.npy: its values go from .* and leave data.range=\[0,1\]"),
        ("a.npy", np.array([{}]), "a.npy: cannot be decoded"),
        ("a.jpg", array(0), "a.jpg: its format has 8 bits"),
    ],
)
def test_arrays_that_cannot_be_used_are_named(name, value, message):
    with pytest.raises(ConfigError, match=message):
        read_array(bytes_of(np.save, value), name, Pixels(**UNIT), 5)


def test_a_truncated_array_is_refused_before_it_is_allocated():
    data = bytes_of(np.save, array(0))
    for broken in (data[:-4], data + b"0", data[:20], b"", data.replace(b"(6, 8, 5)", b"(9**9, )")):
        with pytest.raises(ConfigError, match=r"a\.npy: cannot be decoded"):
            read_array(broken, "a.npy", Pixels(**UNIT), 5)


def test_a_folder_of_arrays(tmp_path):
    values = [array(i) for i in range(10)]
    for i, value in enumerate(values):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        np.save(tmp_path / "ab"[i % 2] / f"{i}.npy", value)
    options = UNIT | {"channels": 5, "image_size": [6, 8]}
    images = ImageFiles(tmp_path, **options)
    assert shape_of(images) == (5, 6, 8) and pixels_of(images) == Pixels(**UNIT)
    assert images.classes == ["a", "b"]
    for pass_ in range(2):  # decoded, then from the cache
        for i in range(10):
            value = values[int(images.names[i].split("/")[1][0])]
            assert np.array_equal(images[i]["image"].numpy(), value.transpose(2, 0, 1)), pass_
    parts = [ImageFiles(tmp_path, part=part, **options).names for part in ("train", "test")]
    assert sorted([*parts[0], *parts[1]]) == images.names and len(parts[1]) == 2
    wider = ImageFiles(tmp_path, **options | {"range": [0, 2]})
    assert wider.fingerprint() != images.fingerprint()

    np.save(tmp_path / "a" / "odd.npy", array(0, (6, 6, 5)))
    with pytest.raises(ConfigError, match=r"a/odd.npy: its image is 6x6 \(height x width\), not"):
        ImageFiles(tmp_path, **options)
    with pytest.raises(ConfigError, match=r"a/odd.npy is 6x6 .* says 8x6. Bring all arrays to one size"):
        ImageFiles(tmp_path, **UNIT, channels=5)
    np.save(tmp_path / "a" / "odd.npy", np.full((6, 8, 5), np.inf, np.float32))
    with pytest.raises(ConfigError, match=r"a/odd.npy: 240 of its 240 values are NaN or infinite"):
        ImageFiles(tmp_path, **options)
    assert len(ImageFiles(tmp_path, on_error="skip", **options)) == 10


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_a_set_in_one_file(tmp_path, ending):
    values, labels = array(0, (20, 6, 8, 5)), np.arange(20) % 3
    path = tmp_path / f"set.{ending}"
    np.save(path, values) if ending == "npy" else np.savez(path, values, labels)
    whole = ArrayImages(path, channels=5, **UNIT)
    assert np.array_equal(whole.images.numpy(), values.transpose(0, 3, 1, 2))
    assert (whole.labels is None) == (ending == "npy") and len(whole.classes) == (0 if ending == "npy" else 3)
    parts = [ArrayImages(path, channels=5, part=part, **UNIT) for part in ("train", "test")]
    found = torch.cat([part.images for part in parts]).flatten(1)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, whole.images.flatten(1).tolist()))
    values[7, 0, 0, 0] = np.nan
    np.save(tmp_path / "bad.npy", values)
    with pytest.raises(ConfigError, match=r"bad\.npy: 1 of its 4800 values are NaN"):
        ArrayImages(tmp_path / "bad.npy", channels=5, **UNIT)
    with pytest.raises(ConfigError, match=r"its shape is \(20, 6, 8, 5\), neither"):
        ArrayImages(path, channels=3, **UNIT)


def test_pictures_are_fitted_to_oblong_sizes():
    """The window of the largest size in the center, and for JPEGs nearly the same from a smaller decoding."""
    ramp = np.arange(200 * 300, dtype=np.float32).reshape(200, 300) / 60000 * 255
    picture = Image.fromarray(np.stack([ramp, ramp[::-1], ramp.T.reshape(200, 300)], -1).astype(np.uint8))
    wanted = picture.crop((0, 25, 300, 175)).resize((16, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(fit_to(picture, [8, 16], "crop")), np.asarray(wanted))
    assert fit_to(picture, (8, 16), "adm").size == fit_to(picture, (8, 16), "stretch").size == (16, 8)
    data = bytes_of(lambda f, x: x.save(f, "JPEG", quality=95), picture)
    for fit in ("crop", "stretch"):
        whole, drafted = (
            decode(data, "a.jpg", image_size=[8, 16], fit=fit, draft=draft).float() for draft in (False, True)
        )
        assert whole.shape == (3, 8, 16) and not torch.equal(whole, drafted)
        assert 10 * torch.log10(255**2 / (whole - drafted).square().mean()) > 40
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown upright, the picture is 200 wide
    turned = bytes_of(lambda f, x: x.save(f, "JPEG", quality=95, exif=exif), picture)
    whole, drafted = (
        decode(turned, "a.jpg", image_size=[16, 8], draft=draft).float() for draft in (False, True)
    )
    assert whole.shape == (3, 16, 8)
    assert 10 * torch.log10(255**2 / (whole - drafted).square().mean()) > 40
