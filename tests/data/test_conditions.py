"""Numbers and images that come with images: from a table, from files of the same names, computed."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from lit_gen.data import ImageDataModule, TensorImages, digits, slant
from lit_gen.data.conditions import Downsample, conditioned, read_table
from lit_gen.data.folders import ImageFiles
from lit_gen.errors import ConfigError
from lit_gen.images import to_float

N = 12


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path):
    """photos/i.jpg, masks/i.png whose level is 10 i, and a table in another order than the files."""
    for i in range(N):
        for kind, ending, level in (("photos", "jpg", 100 + i), ("masks", "png", 10 * i)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(np.full((16, 16), level, np.uint8)).save(tmp_path / kind / f"{i:02d}.{ending}")
    rows = [[f"{i:02d}.jpg", i, i**2] for i in reversed(range(N))]
    write_csv(tmp_path / "photos" / "labels.csv", [["file", "angle", "age"], *rows])
    return tmp_path


def files(folder, **options):
    return ImageFiles(folder / "photos", image_size=8, channels=1, draft=False, **options)


@pytest.mark.parametrize("part", ["all", "train", "test"])
def test_each_image_has_its_own_row_and_file(folder, part):
    dataset = conditioned(files(folder, part=part), vector="labels.csv", image=str(folder / "masks"))
    batch = dataset.batch(range(len(dataset)))
    for i, name in enumerate(dataset.dataset.names):
        k = int(name[:2])
        assert batch["vector"][i].tolist() == dataset[i]["vector"].tolist() == [k, k**2]
        assert (batch["condition_image"][i] == 10 * k).all() and batch["condition_image"].shape[1:] == (
            1,
            8,
            8,
        )
        assert torch.equal(batch["image"][i], dataset[i]["image"])
    assert dataset.fingerprint() == files(folder, part=part).fingerprint()


def test_columns_are_taken_in_the_order_asked_for(folder):
    table = str(folder / "photos" / "labels.csv")
    dataset = conditioned(files(folder), vector=table, columns=["age", "angle"])
    assert dataset[3]["vector"].tolist() == [9, 3]
    assert conditioned(files(folder), vector=table, columns=["age"])[3]["vector"].tolist() == [9]
    with pytest.raises(ConfigError, match=r"labels.csv has no column 'agee'; it has angle, age\."):
        conditioned(files(folder), vector=table, columns=["agee"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["file", "angle"], ["01.jpg", "1"]], r"no row for 11 of the 12 images, 00\.jpg .*of 01\.jpg"),
        ([["angle"], *[["1"]] * N], r"has no row for 12 of the 12 images, 00\.jpg for one"),
        ([["file", "angle"], ["01.jpg", "1", "2"]], "row 2 has 3 cells, the header 2"),
        ([["file", "angle"], ["01.jpg", "north"]], r"row 2, column 'angle': 'north' is no number"),
        ([["file", "angle"], ["01.jpg", "inf"]], "column 'angle' has an infinite number"),
        ([["file", "angle"], *[["01.jpg", "1"]] * 2], r"01\.jpg has more than one row"),
        ([["file"], ["01.jpg"]], "has no columns of numbers"),
        ([], "empty file"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused_by_name(folder, rows, message):
    path = write_csv(folder / "bad.csv", rows)
    with pytest.raises(ConfigError, match=r"bad\.csv.*" + message):
        conditioned(files(folder), vector=str(path))


def test_an_empty_cell_is_not_known(folder):
    path = write_csv(
        folder / "holes.csv", [["file", "angle"], *[[f"{i:02d}.jpg", "" if i else 1] for i in range(N)]]
    )
    assert conditioned(files(folder), vector=str(path)).vectors.isnan().sum() == N - 1


def test_an_npz_has_rows_by_name_or_by_number(tmp_path, folder):
    names = np.array([f"{i:02d}.jpg" for i in reversed(range(N))])
    np.savez(
        tmp_path / "named.npz",
        files=names,
        embedding=np.arange(2 * N).reshape(N, 2)[::-1],
        age=np.arange(N)[::-1],
    )
    dataset = conditioned(files(folder), vector=str(tmp_path / "named.npz"))
    assert dataset[3]["vector"].tolist() == [6, 7, 3]
    assert read_table(str(tmp_path / "named.npz"))[1] == ["embedding_0", "embedding_1", "age"]
    np.savez(tmp_path / "numbered.npz", age=np.arange(5))
    plain = TensorImages(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
    assert conditioned(plain, vector=str(tmp_path / "numbered.npz"))[3]["vector"].tolist() == [3]
    (tmp_path / "broken.npz").write_bytes(b"PK")
    for name, message in (
        ("broken.npz", "no npz file"),
        ("nowhere.csv", "there is no such file"),
        ("a.txt", "csv or an npz"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_table(str(tmp_path / name))


def test_condition_images_that_do_not_fit_are_refused_by_name(folder):
    masks = folder / "masks"
    (masks / "05.png").rename(masks / "5.png")
    with pytest.raises(ConfigError, match=r"masks has no image for 1 of the 12 images, 05\.jpg for one"):
        conditioned(files(folder), image=str(masks))
    (masks / "5.png").rename(masks / "05.png")
    with pytest.raises(ConfigError, match=r"00\.png is 12x12 .* at most as large as the images, 8x8"):
        conditioned(files(folder), image=str(masks), image_size=12)
    assert conditioned(files(folder), image=str(masks), image_size=4)[0]["condition_image"].shape == (1, 4, 4)
    (masks / "03.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"1 unreadable condition image:\n.*03\.png"):
        conditioned(files(folder), image=str(masks))
    with pytest.raises(ConfigError, match="on_error=replace shows other images"):
        conditioned(files(folder, on_error="replace"), vector="labels.csv")


def module(folder, **condition):
    parts = {part: files(folder, part=part) for part in ("train", "test")}
    return ImageDataModule(**parts, batch_size=4, condition=condition)


def test_batches_of_training_and_test_images_have_their_conditions(folder):
    data = module(folder, vector="labels.csv", image=str(folder / "masks"))
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    shown = (batch["image"].mean((1, 2, 3)) * 127.5 + 127.5).round() - 100
    assert_close(batch["vector"][:, 0], shown)
    assert_close((batch["condition_image"].mean((1, 2, 3)) + 1) * 127.5, 10 * shown, atol=1e-3, rtol=0)
    assert batch["condition_image"].dtype == batch["vector"].dtype == torch.float32
    assert torch.equal(data.vectors(), data.train.vectors)
    told = data.conditions(range(5))  # of fewer test images, over and over
    n = len(data.test)
    assert torch.equal(told["vector"][0], data.test[0]["vector"]) and torch.equal(
        told["vector"][n], told["vector"][0]
    )


def test_computed_conditions_are_of_the_batch_as_the_model_gets_it():
    class Flip:
        def __call__(self, image, generator):
            return image.flip(2)

    data = ImageDataModule(
        digits("train"), digits("test"), batch_size=8, augment=Flip(),
        condition={"image": {"downsample": 2}, "vector": slant},
    )  # fmt: skip
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert_close(batch["condition_image"], torch.nn.functional.avg_pool2d(batch["image"], 2))
    assert_close(batch["vector"], slant(batch["image"]))
    plain = slant(to_float(digits("train").images))
    assert_close(batch["vector"], -plain[batch["index"]], atol=1e-5, rtol=0)  # of the mirrored digit
    assert_close(data.vectors(), plain)
    with pytest.raises(ConfigError, match="does not divide 8x8"):
        Downsample(3)(batch["image"])
    with pytest.raises(ConfigError, match=r"\{downsample: 2\}"):
        ImageDataModule(digits(), digits(), condition={"image": {"blur": 2}})


def test_files_of_condition_images_are_not_augmented(folder):
    with pytest.raises(ConfigError, match=r"data\.augment changes images"):
        ImageDataModule(files(folder), files(folder), augment=lambda x, g: x, condition={"image": "masks"})


def test_slant_is_the_shear_that_was_made():
    """A bar of 1 pixel, every row moved right by k times its height."""
    images = torch.full((3, 1, 9, 25), -1.0)
    for i, k in enumerate((-1, 0, 1)):
        for row in range(9):
            images[i, 0, row, 12 + k * (4 - row)] = 1.0
    assert_close(slant(images), torch.tensor([[-1.0], [0.0], [1.0]]))
