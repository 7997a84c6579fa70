"""What a user names by a path: images, classes, masks, and statistics of images that are elsewhere."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lit_gen import inputs
from lit_gen.data.digits import digits
from lit_gen.errors import ConfigError
from lit_gen.images import BYTES, save_png
from lit_gen.metrics import Moments

IMAGES = torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    """Images 0 to 2 in class a, 3 and 4 in class b."""
    for i, image in enumerate(IMAGES):
        place = tmp_path / "images" / ("a" if i < 3 else "b")
        place.mkdir(parents=True, exist_ok=True)
        save_png(image, place / f"{i}.png")
    return tmp_path / "images"


def test_images_of_a_folder_and_of_an_array_are_the_same(folder, tmp_path):
    np.savez(tmp_path / "images.npz", IMAGES.permute(0, 2, 3, 1).numpy())
    for path in (folder, tmp_path / "images.npz"):
        found = inputs.open_images(path)
        assert torch.equal(torch.stack([found[i]["image"] for i in range(len(found))]), IMAGES)
    with pytest.raises(ConfigError, match="image_size=4 resizes picture files"):
        inputs.open_images(tmp_path / "images.npz", image_size=4)


def test_a_reference_is_moments_or_images(folder, tmp_path):
    extractor = SimpleNamespace(id=SimpleNamespace(resize="tf1", d=2))
    assert len(inputs.open_reference(folder, extractor)) == 5
    with pytest.raises(ConfigError, match="describe a statistics file"):
        inputs.open_reference(folder, extractor, n=5)
    np.savez(tmp_path / "stats.npz", mu=np.array([1.0, 2.0]), sigma=np.eye(2))
    with pytest.raises(ConfigError, match="does not say reference_n nor reference_resize"):
        inputs.open_reference(tmp_path / "stats.npz", extractor)
    found = inputs.open_reference(tmp_path / "stats.npz", extractor, n=7, resize="tf1")
    assert isinstance(found, Moments) and found.n == 7
    assert found.mean.tolist() == [1, 2] and torch.equal(found.cov, torch.eye(2, dtype=torch.float64))


def test_classes_must_agree(folder):
    images, others = inputs.open_images(folder), digits("test")
    assert (inputs.classes_of(images, images), inputs.classes_of(others)) == (2, 10)
    with pytest.raises(ConfigError, match="per_class=true needs sets in the same classes"):
        inputs.classes_of(images, others)


def test_contents(folder, tmp_path, capsys):
    found = inputs.read_pictures(folder, 4, image_size=8)
    assert list(found) == ["a/0", "a/1", "a/2", "b/3"] and torch.equal(
        torch.stack([*found.values()]), IMAGES[:4]
    )
    assert "has 5 images, the first 4" in capsys.readouterr().out
    (name, image), *rest = inputs.read_pictures(folder / "b" / "4.png", 9, image_size=8).items()
    assert name == "4" and torch.equal(image, IMAGES[4]) and not rest
    with pytest.raises(ConfigError, match="there is no such image or folder"):
        inputs.read_pictures(tmp_path / "nowhere", 1, image_size=8)


def test_class_folders(folder, tmp_path):
    found = inputs.read_class_folders(folder, None, 3, 8)
    assert torch.equal(found["a"], IMAGES[:3]) and torch.equal(found["b"], IMAGES[3:])
    assert torch.equal(inputs.read_class_folders(folder, 2, 3, 8)["a"], IMAGES[:2])
    assert torch.equal(inputs.read_class_folders(folder / "b", 2, 3, 8)["b"], IMAGES[3:])
    with pytest.raises(ConfigError, match=r"k=3: class 'b' of .* has 2 images"):
        inputs.read_class_folders(folder, 3, 3, 8)
    with pytest.raises(ConfigError, match="there is no such folder"):
        inputs.read_class_folders(tmp_path / "nowhere", None, 3, 8)


MASKS = {
    "center": ["1111", "1001", "1001", "1111"],
    "left": ["0011"] * 4,
    "right": ["1100"] * 4,
    "top": ["0000", "0000", "1111", "1111"],
    "bottom": ["1111", "1111", "0000", "0000"],
}


@pytest.mark.parametrize("name", MASKS)
def test_named_masks(name):
    expected = torch.tensor([[c == "1" for c in row] for row in MASKS[name]])
    assert torch.equal(inputs.mask_of(name, 4), expected[None])


def test_masks_of_oblong_images(tmp_path):
    center = inputs.mask_of("center", [4, 8])
    assert center.shape == (1, 4, 8) and (~center).nonzero()[:, 1:].tolist() == [
        [y, x] for y in (1, 2) for x in (2, 3, 4, 5)
    ]
    for name, unknown in {"left": (4, 4), "top": (2, 8)}.items():
        mask = inputs.mask_of(name, [4, 8])
        assert not mask[0, : unknown[0], : unknown[1]].any() and int((~mask).sum()) == 16
    drawn = torch.zeros(1, 4, 8, dtype=torch.uint8)
    drawn[:, :, 5:] = 255
    path = save_png(drawn, tmp_path / "mask.png")
    assert torch.equal(inputs.mask_of(str(path), [4, 8]), drawn > 127)


def test_other_masks(tmp_path):
    drawn = inputs.mask_of("random", 64)
    assert torch.equal(drawn, inputs.mask_of("random", 64)) and 0.45 < drawn.float().mean() < 0.55
    brightness = torch.tensor([[0, 127], [128, 255]], dtype=torch.uint8)
    path = save_png(brightness.expand(3, 2, 2), tmp_path / "mask.png")
    assert inputs.mask_of(str(path), 2).tolist() == [[[False, False], [True, True]]]
    with pytest.raises(ConfigError, match="must be one of center, left"):
        inputs.mask_of("middle", 4)


def asked(images, label=None, num=2):
    return OmegaConf.create({"images": str(images), "label": label, "num": num})


def model(num_classes=0, label_dropout=0.0, shape=(3, 8, 8)):
    return SimpleNamespace(
        image_shape=shape, pixels=BYTES, num_classes=num_classes, dropout={"label": label_dropout}
    )


def test_pictures_and_what_a_conditional_model_is_told(folder):
    images, label = inputs.pictures(asked(folder), None, model())
    assert torch.equal(images, IMAGES[:2]) and label is None
    assert inputs.pictures(asked(folder), None, model(10, label_dropout=0.1))[1] is None
    assert inputs.pictures(asked(folder, label=3), None, model(10))[1].tolist() == [3, 3]
    with pytest.raises(ConfigError, match="give label=<0 to 9>"):
        inputs.pictures(asked(folder), None, model(10))
    with pytest.raises(ConfigError, match="label=10: the model's classes are 0 to 9"):
        inputs.pictures(asked(folder, label=10), None, model(10))


def test_the_test_images_of_a_run_have_their_classes():
    data = {"_target_": "lit_gen.data.ImageDataModule", "batch_size": 4}
    data |= {split: {"_target_": "lit_gen.data.digits", "split": split} for split in ("train", "test")}
    run = OmegaConf.create({"data": data})
    images, label = inputs.pictures(asked("test", num=6), run, model(10, shape=(1, 8, 8)))
    expected = digits("test").batch(range(6))
    assert torch.equal(images, expected["image"]) and torch.equal(label, expected["label"])
    with pytest.raises(ConfigError, match="images=test are those of a run"):
        inputs.pictures(asked("test"), None, model())
