"""What files say of their images, from which experiment=images takes its configuration."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from lit_gen.data.folders import ImageFiles
from lit_gen.data.survey import Survey, survey
from lit_gen.errors import ConfigError

rng = np.random.default_rng(0)


def write(path, height, width, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16)).save(path)
        return
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("P", 3), ("1", 1), ("RGBA", 3)])
def test_channels_of_pictures(tmp_path, mode, channels):
    write(tmp_path / "a.png", 8, 12, mode)
    found = survey(tmp_path)
    assert (found.channels, found.dtype, found.range, found.arrays) == (channels, "uint8", None, False)
    assert found.sizes == ((8, 12),) and found.num == 1


def test_gray_and_color_together_are_color(tmp_path):
    write(tmp_path / "a.png", 8, 8, "L")
    write(tmp_path / "b.jpg", 8, 8)
    assert survey(tmp_path).channels == 3


def test_16_bits_are_kept(tmp_path):
    write(tmp_path / "a.png", 8, 8, "I;16")
    found = survey(tmp_path)
    assert (found.dtype, found.channels, found.range) == ("uint16", 1, None)
    ImageFiles(tmp_path, channels=found.channels, dtype=found.dtype, image_size=found.size_for(32))


@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
@pytest.mark.parametrize(("scale", "shift", "limits"), [(1, 0, [0, 1]), (2, -1, [-1, 1]), (200, 0, [0, 255])])
def test_arrays_of_floats_and_five_channels(tmp_path, first, scale, shift, limits):
    for i in range(3):
        shape = (5, 8, 12) if first else (8, 12, 5)
        np.save(tmp_path / f"{i}.npy", (rng.random(shape) * scale + shift).astype(np.float32))
    found = survey(tmp_path)
    assert (found.channels, found.dtype, found.range) == (5, "float32", limits)
    assert found.size_for(4) == [8, 12]  # nothing resizes arrays
    options = {"channels": 5, "dtype": "float32", "range": found.range, "image_size": [8, 12]}
    assert ImageFiles(tmp_path, **options).shape == (5, 8, 12)


def test_another_range_has_to_be_said(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[-3.5, 2000.25]], np.float32))
    with pytest.raises(ConfigError, match=r"from -3\.5 to 2000\.25 .* data\.range=\[-4,2001\]"):
        _ = survey(tmp_path).range


def test_folders_are_classes_if_they_are_large_enough(tmp_path):
    for i in range(20):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", 4, 4)
    assert survey(tmp_path).classes == 2
    write(tmp_path / "loose.png", 4, 4)
    assert survey(tmp_path).classes == 0
    assert ImageFiles(tmp_path, labeled=False, image_size=4).labels is None
    (tmp_path / "loose.png").unlink()
    for i in range(5):
        write(tmp_path / f"c{i}" / "0.png", 4, 4)
    assert survey(tmp_path).classes == 0


def test_a_zip(tmp_path):
    write(tmp_path / "a.png", 8, 8)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    assert survey(tmp_path / "a.zip").num == 1


@pytest.mark.parametrize(
    ("sizes", "side", "expected"),
    [
        ([(480, 640)] * 9 + [(640, 480)], 32, [28, 36]),  # nine in ten are alike
        ([(480, 640)] * 8 + [(640, 480)] * 2, 32, 32),
        ([(480, 640)], 64, [56, 72]),
        ([(28, 28)], 32, 28),  # small ones of one size keep it
        ([(30, 30)], 32, 32),
        ([(20, 20), (20, 24)], 64, 20),  # not enlarged
        ([(1000, 100)], 32, [100, 12]),
    ],
)
def test_the_size_to_train_at(tmp_path, sizes, side, expected):
    found = Survey(tmp_path, len(sizes), tuple(sizes), False, "uint8", 3, 0)
    assert found.size_for(side) == expected


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="no images"):
        survey(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"a\.png: cannot be decoded"):
        survey(tmp_path)
    (tmp_path / "a.png").unlink()
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((4, 4), np.uint16))
    with pytest.raises(ConfigError, match=r"b\.npy has pixels of type uint16, a\.npy has float32"):
        survey(tmp_path)
    np.save(tmp_path / "b.npy", np.zeros((4, 4, 2), np.float32))
    with pytest.raises(ConfigError, match=r"b\.npy has channels: 2, a\.npy has 1"):
        survey(tmp_path)


def test_what_cannot_be_read_is_left_to_the_data_set(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no picture")
    for i in range(1, 4):
        write(tmp_path / f"{i}.png", 8, 12, "L")
    found = survey(tmp_path)
    assert (found.channels, found.sizes) == (1, ((8, 12),) * 3)
    options = {"channels": 1, "image_size": found.size_for(32)}
    assert len(ImageFiles(tmp_path, on_error="skip", **options)) == 3
    with pytest.raises(ConfigError, match=r"0\.png: cannot be decoded"):
        ImageFiles(tmp_path, **options)


def test_numbers_that_are_none_are_left_to_the_scan(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 4), np.nan, np.float32))
    np.save(tmp_path / "b.npy", np.array([[0.25, np.inf], [0.75, 0.5]], np.float32))
    assert survey(tmp_path).limits == (0.25, 0.75)


def test_an_array_that_is_no_image_is_named(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((8, 6, 5), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(9, np.float32))
    with pytest.raises(ConfigError, match=r"labels\.npy is an array of shape \(9,\), an image has two or"):
        survey(str(tmp_path))
