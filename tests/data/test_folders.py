"""Image folders and zips: classes, labels, splits, errors, and the contract of a data set."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lit_gen.data.decode import UnreadableImage
from lit_gen.data.folders import ImageFiles
from lit_gen.errors import ConfigError

REAL = Path("/work/shared/data")


def picture(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, 2 * value, 3))


def make(folder: Path, files: dict[str, int], size: tuple[int, int] = (8, 8)) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value, size).save(folder / name)
    return folder


def packed(folder: Path, target: Path, described: object = None) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
        if described is not None:
            archive.writestr("dataset.json", json.dumps(described))
    return target


FILES = {f"{c}/{i}.png": 10 * k + i for k, c in enumerate(("ant", "bee", "cat")) for i in range(10)}


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "set", FILES)


def test_a_class_per_folder(folder):
    data = ImageFiles(folder)
    assert data.classes == ["ant", "bee", "cat"]
    assert data.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert (len(data), data[0]["image"].shape) == (30, (3, 8, 8))
    assert [data[i]["image"][0, 0, 0].item() for i in range(30)] == list(FILES.values())
    assert [data[i]["label"] for i in range(30)] == data.labels.tolist()
    assert data[7]["image"].dtype == torch.uint8


def test_zip_and_folder_are_the_same_data_set(folder, tmp_path):
    one, two = ImageFiles(folder), ImageFiles(packed(folder, tmp_path / "set.zip"))
    assert one.names == two.names
    assert all(
        (one[i]["image"] == two[i]["image"]).all() and one[i]["label"] == two[i]["label"] for i in range(30)
    )


@pytest.mark.parametrize("cache_mib", [0, 16])
@pytest.mark.parametrize("packing", ["folder", "zip"])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_the_main_process_reads(folder, tmp_path, packing, cache_mib, context):
    path = folder if packing == "folder" else packed(folder, tmp_path / "set.zip")
    data = ImageFiles(path, cache_mib=cache_mib)
    data[0]  # opens the handle before the workers are made
    loader = DataLoader(data, batch_size=5, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(
        torch.cat([b["image"] for b in batches]), torch.stack([data[i]["image"] for i in range(30)])
    )
    assert torch.equal(torch.cat([b["label"] for b in batches]), data.labels)


def test_pickled_it_reads_on(folder, tmp_path):
    data = ImageFiles(packed(folder, tmp_path / "set.zip"), cache_mib=0)
    assert torch.equal(pickle.loads(pickle.dumps(data))[3]["image"], data[3]["image"])


def test_images_in_one_folder_have_no_classes(tmp_path):
    data = ImageFiles(make(tmp_path / "flat", {"b.png": 2, "a.png": 1}))
    assert data.labels is None
    assert data.classes == []
    assert data[0]["label"] == 0
    assert data.names == ["a.png", "b.png"]
    assert ImageFiles(make(tmp_path / "deep", {"x/y/a.png": 1})).labels is None


def test_deep_folders_name_classes_by_path(tmp_path):
    files = {f"root/{a}/{c}/0.png": 1 for a in ("Greek", "Latin") for c in ("01", "02")}
    path = make(tmp_path / "set", files)
    assert ImageFiles(path).classes == ["Greek/01", "Greek/02", "Latin/01", "Latin/02"]


def test_an_image_beside_the_class_folders_is_named(folder):
    picture(1).save(folder / "loose.png")
    with pytest.raises(ConfigError, match=r"loose\.png lies beside the class folders"):
        ImageFiles(folder)


def test_dataset_json_gives_labels_and_classes(folder, tmp_path):
    labels = [[name, i % 4] for i, name in enumerate(sorted(FILES))]
    data = ImageFiles(packed(folder, tmp_path / "a.zip", {"labels": labels, "classes": list("wxyz")}))
    assert data.classes == list("wxyz")
    assert data.labels.tolist() == [i % 4 for i in range(30)]
    assert ImageFiles(packed(folder, tmp_path / "b.zip", {"labels": labels})).classes == list("0123")
    assert ImageFiles(packed(folder, tmp_path / "c.zip", {"labels": None})).classes == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ([1, 2], r'"labels" must be null or a list|has no label'),
        ({"labels": 3}, r'"labels" must be null or a list'),
        ({"labels": [["ant/0.png", 0]]}, "has no label for 29 images, ant/1.png for one"),
        ({"labels": [[n, 0.5] for n in FILES]}, "the label of ant/0.png is 0.5"),
        ({"labels": [[n, -1] for n in FILES]}, "is -1; lit_gen takes class indices"),
        ({"labels": [[n, 10**12] for n in FILES]}, "is 1000000000000; lit_gen takes"),
        ({"labels": [[n, [1, 0]] for n in FILES]}, r"is \[1, 0\]; lit_gen takes"),
        ({"labels": [[n, 2] for n in FILES], "classes": ["a"]}, r'"classes" must be a list that names all 3'),
    ],
)
def test_bad_descriptions(folder, tmp_path, described, message):
    with pytest.raises(ConfigError, match=message):
        ImageFiles(packed(folder, tmp_path / "set.zip", described))


def test_a_description_that_is_no_json(folder):
    (folder / "dataset.json").write_text("{labels: ")
    with pytest.raises(ConfigError, match=r"dataset\.json: not JSON"):
        ImageFiles(folder)


def test_chosen_classes_are_renumbered_in_the_order_given(folder):
    data = ImageFiles(folder, classes=["cat", "ant"])
    assert data.classes == ["cat", "ant"]
    assert data.labels.tolist() == [1] * 10 + [0] * 10
    assert data[0]["image"][0, 0, 0] == 0  # an ant
    with pytest.raises(ConfigError, match=r"unknown class 'dog'; its 3 classes begin with ant, bee, cat"):
        ImageFiles(folder, classes=["dog"])


def test_a_pattern_keeps_the_numbers_of_the_classes(tmp_path):
    path = make(tmp_path / "set", {"a/train_1.png": 1, "b/train_1.png": 2, "b/test_1.png": 3})
    data = ImageFiles(path, include="*/test_*")
    assert data.classes == ["a", "b"]
    assert data.labels.tolist() == [1]
    with pytest.raises(
        ConfigError, match=r"no image matches include='\*/val_\*'; one of the 3 is 'a/train_1\.png'"
    ):
        ImageFiles(path, include="*/val_*")


def test_the_split_is_disjoint_complete_stratified_and_keyed(folder):
    train, test = (ImageFiles(folder, part=p, test_fraction=0.3, seed=5) for p in ("train", "test"))
    assert sorted(train.names + test.names) == ImageFiles(folder).names
    assert test.labels.bincount().tolist() == [3, 3, 3]
    assert train.classes == test.classes == ["ant", "bee", "cat"]
    assert test.names == ImageFiles(folder, part="test", test_fraction=0.3, seed=5).names
    assert test.names != ImageFiles(folder, part="test", test_fraction=0.3, seed=6).names
    # A class that is left out moves no image of another to the other side.
    assert set(ImageFiles(folder, classes=["bee"], part="test", test_fraction=0.3, seed=5).names) <= set(
        test.names
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "val"}, "part='val': must be one of all, train, test"),
        ({"part": "test", "test_fraction": 1.0}, "test_fraction=1.0: must lie between 0 and 1"),
        ({"on_error": "skip", "scan": False}, "on_error=skip needs scan=true"),
        ({"on_error": "hide"}, "on_error='hide'"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        ImageFiles(folder, **options)


def test_sizes_that_differ_are_named_with_the_remedy(folder):
    picture(1, (9, 8)).save(folder / "bee" / "3.png")
    with pytest.raises(ConfigError, match=r"bee/3\.png is 9x8 .* says 8x8\. Set image_size"):
        ImageFiles(folder)
    late = ImageFiles(folder, scan=False)
    with pytest.raises(ConfigError, match=r"bee/3\.png is 9x8"):
        late[13]
    assert ImageFiles(folder, image_size=4)[13]["image"].shape == (3, 4, 4)


def test_images_of_one_size_may_be_oblong(tmp_path):
    path = make(tmp_path / "set", {"a.png": 1}, (6, 4))
    assert ImageFiles(path).shape == ImageFiles(path, image_size=[4, 6]).shape == (3, 4, 6)
    assert ImageFiles(path, image_size=4, fit="shorter")[0]["image"].shape == (3, 4, 6)


def test_bad_images_raise_at_once_or_are_skipped_and_counted(folder):
    (folder / "bee" / "3.png").write_bytes(b"")
    (folder / "cat" / "4.png").write_bytes((folder / "cat" / "5.png").read_bytes()[:20])
    with pytest.raises(
        ConfigError, match=r"(?s)2 unreadable images:.*bee/3\.png: empty file.*cat/4\.png.*on_error=skip"
    ):
        ImageFiles(folder)
    data = ImageFiles(folder, on_error="skip")
    assert set(data.skipped) == {"bee/3.png", "cat/4.png"}
    assert data.labels.bincount().tolist() == [10, 9, 9]
    assert "bee/3.png" not in data.names
    late = ImageFiles(folder, scan=False)
    with pytest.raises(ConfigError, match=r"bee/3\.png: empty file"):
        late[13]


def cut(file: Path) -> None:
    """Takes the pixels away and leaves the header."""
    data = file.read_bytes()
    file.write_bytes(data[: data.index(b"IDAT") + 6])


def test_what_cannot_be_decoded_is_named_when_read_or_left_out(folder):
    """A truncated image has a whole header: only "skip" decodes at the start."""
    cut(folder / "cat" / "4.png")
    data = ImageFiles(folder)
    assert len(data) == 30
    with pytest.raises(UnreadableImage, match=r"cat/4\.png: cannot be decoded"):
        data[24]
    assert set(ImageFiles(folder, on_error="skip").skipped) == {"cat/4.png"}


@pytest.mark.parametrize("packing", ["folder", "zip"])
@pytest.mark.parametrize("scan", [True, False])
def test_a_broken_image_is_replaced_by_another_of_its_class(folder, tmp_path, packing, scan):
    """By (seed, index) alone: the same in every process and epoch, with one warning that names it."""
    broken = ["ant/0.png", "bee/3.png", "cat/4.png"]
    (folder / broken[0]).write_bytes(b"")
    for name in broken[1:]:
        cut(folder / name)
    path = folder if packing == "folder" else packed(folder, tmp_path / "set.zip")
    good = {name: value for name, value in FILES.items() if name not in broken}

    def read(seed: int) -> list[int]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = ImageFiles(path, on_error="replace", scan=scan, cache_mib=0, seed=seed)
            values = [[int(data[i]["image"][0, 0, 0]) for i in range(30)] for _ in range(2)]
        assert values[0] == values[1]
        assert sum("bee/3.png: cannot be decoded" in str(w.message) for w in caught) == 1
        assert len(data) == 30 and data.skipped == {}
        return values[0]

    values = read(0)
    assert values == read(0)
    for value, name in zip(values, FILES, strict=True):
        expected = {FILES[name]} if name in good else {v for n, v in good.items() if n[:3] == name[:3]}
        assert value in expected, name
    assert len({tuple(read(seed)) for seed in range(4)}) > 1


def test_no_image_of_a_class_can_be_read(folder):
    for file in (folder / "bee").iterdir():
        file.write_bytes(b"")
    data = ImageFiles(folder, on_error="replace")
    with (
        pytest.warns(UserWarning),
        pytest.raises(UnreadableImage, match="nor can 100 draws from the 10 that"),
    ):
        data[13]


def test_what_one_worker_decodes_all_processes_have(folder):
    data = ImageFiles(folder)
    list(DataLoader(data, batch_size=5, num_workers=2, multiprocessing_context="fork"))
    data.store.read = lambda *_: pytest.fail("decoded again")
    assert [data[i]["image"][0, 0, 0].item() for i in range(30)] == list(FILES.values())


def test_nothing_to_read(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: no images"):
        ImageFiles(tmp_path / "empty")
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match="all 30 images are unreadable"):
        ImageFiles(folder, on_error="skip")


def test_the_fingerprint_changes_with_whatever_changes_the_images(folder, tmp_path):
    archive = packed(folder, tmp_path / "set.zip")
    base = ImageFiles(archive).fingerprint()
    assert base == ImageFiles(archive, cache_mib=0, scan=False).fingerprint()
    assert base == ImageFiles(archive, draft=False).fingerprint()  # nothing is resized
    others = [
        ImageFiles(archive, image_size=4),
        ImageFiles(archive, channels=1),
        ImageFiles(archive, classes=["cat", "bee", "ant"]),
        ImageFiles(archive, part="train"),
        ImageFiles(archive, image_size=4, draft=False),
        ImageFiles(archive, on_error="replace"),
        ImageFiles(archive, on_error="replace", seed=1),
    ]
    picture(99).save(folder / "ant" / "0.png")
    others.append(ImageFiles(packed(folder, tmp_path / "set.zip")))
    assert len({base, *(o.fingerprint() for o in others)}) == 9


@pytest.mark.parametrize(
    ("name", "options", "size", "images", "classes"),
    [
        ("cifar10-test.zip", {"scan": False}, 32, 10_000, 10),
        ("grocery-64.zip", {"include": "*/train_*"}, 64, 2_640, 81),
        ("omniglot-small1.zip", {"channels": 1}, 105, 2_720, 136),
        ("omniglot-small1.zip", {"image_size": 32, "scan": False}, 32, 2_720, 136),
        ("animals-64.zip", {"scan": False}, 64, 29_309, 59),
    ],
)
def test_real_sets(name, options, size, images, classes):
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not here")
    data = ImageFiles(REAL / name, **options)
    assert (data[0]["image"].shape[-1], len(data), len(data.classes)) == (size, images, classes)
    assert data.labels.unique().tolist() == list(range(classes))
    spread = np.std([data[i]["image"].float().mean().item() for i in range(0, images, images // 20)])
    assert spread > 1  # different pictures
