"""VOC and COCO: the boxes' conventions, bad annotations named by file, batches that depend on keys alone."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import horizontal_flip
from torchvision.tv_tensors import BoundingBoxes

from lit_gen.augment import AugMix, AutoAugment, Policy, RandAugment
from lit_gen.data.detection import BoxedImages, coco, voc
from lit_gen.data.detection_module import DetectionDataModule, KeyedBoxes, PolicyAugment
from lit_gen.data.scenes import Scenes
from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.rng import keyed_generator

REAL = Path("/work/shared/data/bccd-voc.zip")


def xml(*objects: tuple, size: tuple[int, int] = (20, 10)) -> str:
    nodes = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1, difficult in ((*o, 0)[:6] for o in objects)
    )
    return (
        f"<annotation><filename>wrong.jpg</filename><size><width>{size[0]}</width></size>{nodes}</annotation>"
    )


@pytest.fixture
def layout(tmp_path) -> Path:
    """Three images of 20 x 10; `a` has two objects, `b` one, which is difficult, `c` none."""
    root = tmp_path / "VOC"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for k, name in enumerate("abc"):
        Image.new("RGB", (20, 10), (k, 0, 0)).save(root / "JPEGImages" / f"{name}.png")
    (root / "Annotations/a.xml").write_text(xml(("dog", 1, 1, 20, 10), ("cat", 3, 4, 3, 4)))
    (root / "Annotations/b.xml").write_text(xml(("dog", 5, 2, 9, 8, 1)))
    (root / "Annotations/c.xml").write_text(xml())
    (root / "ImageSets/Main/train.txt").write_text("b  1\nc -1\n")
    return root


def test_voc_boxes_count_from_one_and_include_both_corners(layout):
    """(1, 1, 20, 10) covers the whole 20 x 10 image, (3, 4, 3, 4) is one pixel."""
    data = voc(layout)
    assert data.classes == ["cat", "dog"]
    first = data[0]
    assert first["boxes"].tolist() == [[0, 0, 20, 10], [2, 3, 3, 4]]
    assert first["labels"].tolist() == [1, 0]
    assert first["image"].shape == (3, 10, 20)
    assert (first["boxes"].dtype, first["labels"].dtype, first["image"].dtype) == (
        torch.float32,
        torch.int64,
        torch.uint8,
    )
    assert data[2]["boxes"].shape == (0, 4)


def test_a_split_has_the_classes_of_all(layout):
    data = voc(layout, "train")
    assert len(data) == 2
    assert data.classes == ["cat", "dog"]
    assert data[0]["labels"].tolist() == [1]
    assert voc(layout, "train", difficult=False)[0]["boxes"].shape == (0, 4)
    with pytest.raises(ConfigError, match=r"no split 'val' in ImageSets/Main/; there are train"):
        voc(layout, "val")


def test_voc_in_a_zip_and_below_the_path(layout, tmp_path):
    with zipfile.ZipFile(tmp_path / "voc.zip", "w") as archive:
        for file in layout.rglob("*.*"):
            archive.write(file, f"deep/er/{file.relative_to(layout)}")
    one, two = voc(layout), voc(tmp_path / "voc.zip")
    for i in range(3):
        assert all(torch.equal(one[i][k], two[i][k]) for k in one[i])
    shutil.copytree(layout, layout / "again")
    with pytest.raises(ConfigError, match=r"needs one VOC folder .* found 2 of them: , again/"):
        voc(layout)
    with pytest.raises(ConfigError, match="found none"):
        voc(layout / "JPEGImages")


def test_stretching_moves_boxes_with_the_pixels(layout):
    picture = Image.new("L", (20, 10))
    picture.paste(255, (4, 2, 12, 8))
    picture.save(layout / "JPEGImages/a.png")
    (layout / "Annotations/a.xml").write_text(xml(("dog", 5, 3, 12, 8)))
    data = voc(layout, image_size=40)
    item = data[0]
    assert item["boxes"].tolist() == [[8, 8, 24, 32]]
    inside = torch.zeros(40, 40, dtype=torch.bool)
    inside[8:32, 8:24] = True
    assert (item["image"][0][inside] > 127).all()
    assert (item["image"][0][~inside] < 128).all()


BAD = {
    "outside": (xml(("dog", 1, 1, 22, 5)), r"box \(0, 0, 22, 5\) lies outside the 20x10 image"),
    "left of it": (xml(("dog", -4, 1, 5, 5)), r"box \(-5, 0, 5, 5\) lies outside"),
    "inverted": (xml(("dog", 9, 2, 5, 8)), r"box \(8, 1, 5, 8\) is empty or inverted"),
    "not finite": (xml(("dog", "nan", 2, 5, 8)), r"is not finite"),
    "unknown": (xml(("wolf", 1, 1, 5, 5)), "unknown class 'wolf'"),
    "no xml": ("<annotation><object>", "not a VOC annotation"),
    "no number": (xml(("dog", "left", 1, 5, 5)), "not a VOC annotation"),
    "no box": ("<annotation><object><name>dog</name></object></annotation>", "not a VOC annotation"),
    "entities": (
        '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>',
        "declares a document type",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_annotations_are_named_or_left_out(layout, kind):
    text, message = BAD[kind]
    (layout / "Annotations/b.xml").write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)1 bad annotation:.*b\.xml: .*{message}.*on_error=skip"):
        voc(layout, classes=["dog", "cat"])
    data = voc(layout, classes=["dog", "cat"], on_error="skip")
    whole = kind in ("no xml", "no number", "no box", "entities")
    assert (len(data.skipped), len(data.dropped)) == ((1, 0) if whole else (0, 1))
    assert len(data) == (2 if whole else 3)
    assert sum(len(data[i]["boxes"]) for i in range(len(data))) == 2


def test_boxes_that_stick_out_by_a_pixel_are_clipped(layout):
    (layout / "Annotations/b.xml").write_text(xml(("dog", 0, 0, 21, 11)))
    assert voc(layout)[1]["boxes"].tolist() == [[0, 0, 20, 10]]


@pytest.mark.parametrize("scan", [True, False])
def test_missing_and_unreadable_images_are_named_or_left_out(layout, scan):
    (layout / "JPEGImages/a.png").unlink()
    (layout / "JPEGImages/b.png").write_bytes(b"no picture")
    message = (
        r"(?s)2 bad annotations:.*a\.xml: its image JPEGImages/a\.jpg is missing.*b\.png: cannot be decoded"
    )
    with pytest.raises(ConfigError, match=message):
        voc(layout, scan=scan)
    data = voc(layout, on_error="skip", scan=scan)
    assert data.names == ["JPEGImages/c.png"]
    assert len(data.skipped) == 2
    (layout / "JPEGImages/c.png").unlink()
    with pytest.raises(ConfigError, match=r"no annotated image is left \(3 are bad\)"):
        voc(layout, on_error="skip", scan=scan)


def described() -> dict:
    return {
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [{"id": k, "file_name": f"{name}.png"} for k, name in enumerate("abc", 10)],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [2, 3, 4.5, 5], "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0, 0, 20, 10], "iscrowd": 1},
            {"id": 3, "image_id": 12, "category_id": 3, "bbox": [0, 0, 20, 10]},
        ],
    }


def as_coco(layout: Path, what: object, **options) -> BoxedImages:
    (layout / "coco.json").write_text(json.dumps(what))
    return coco(layout, "coco.json", "JPEGImages/", **options)


def test_coco_boxes_and_categories(layout):
    data = as_coco(layout, described())
    assert data.classes == ["cat", "dog"]
    assert data[0]["boxes"].tolist() == [[2, 3, 6.5, 8]]
    assert data[0]["labels"].tolist() == [1]
    assert data[1]["boxes"].shape == (0, 4)
    assert data[2]["labels"].tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 4}, r"image 10 \(JPEGImages/a\.png\): unknown class 'category 4'"),
        (
            {"bbox": [0, 0, 30, 5]},
            r"image 10 \(JPEGImages/a\.png\): box \(0, 0, 30, 5\) lies outside the 20x10",
        ),
        ({"bbox": [5, 5, 0, 2]}, "is empty or inverted"),
        ({"bbox": [5, 5, -3, 2]}, "is empty or inverted"),
        ({"image_id": 99}, "annotation 1 is of no listed image"),
    ],
)
def test_bad_coco_annotations(layout, change, message):
    what = described()
    what["annotations"][0] |= change
    with pytest.raises(ConfigError, match=rf"(?s)1 bad annotation:.*coco\.json.*{message}"):
        as_coco(layout, what)
    data = as_coco(layout, what, on_error="skip")
    assert len(data.dropped) + len(data.skipped) == 1
    assert sum(len(data[i]["boxes"]) for i in range(3)) == 1


@pytest.mark.parametrize(
    "what", [[], {}, {"images": 3, "categories": [], "annotations": []}, {"images": [{"id": "x"}]}, 5]
)
def test_files_that_are_no_coco(layout, what):
    with pytest.raises(ConfigError, match=r"coco\.json: not a COCO annotation file"):
        as_coco(layout, what)
    with pytest.raises(ConfigError, match=r"none\.json: missing"):
        coco(layout, "none.json")


def test_fingerprints_follow_boxes(layout):
    before = voc(layout).fingerprint()
    assert voc(layout, scan=False).fingerprint() == before
    assert voc(layout, image_size=8).fingerprint() != before
    (layout / "Annotations/a.xml").write_text(xml(("dog", 2, 1, 20, 10), ("cat", 3, 4, 3, 4)))
    assert voc(layout).fingerprint() != before


def flipped(boxes, image):
    given = BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
    return horizontal_flip(given).as_subclass(torch.Tensor)


def jitter(image, boxes, labels, generator):
    if torch.rand((), generator=generator) < 0.5:
        return image.flip(-1), flipped(boxes, image), labels
    return image, boxes, labels


def equal(a: dict, b: dict) -> bool:
    lists = all(torch.equal(x, y) for k in ("boxes", "labels") for x, y in zip(a[k], b[k], strict=True))
    return lists and torch.equal(a["image"], b["image"]) and torch.equal(a["index"], b["index"])


def test_batches_depend_on_keys_alone():
    data = Scenes(size=20)
    keys = [(0, 3), (1, 3), (5, 19)]
    whole = KeyedBoxes(data, jitter, seed=1).__getitems__(keys)
    parts = [KeyedBoxes(data, jitter, seed=1).__getitems__([k]) for k in keys]
    merged = {k: [x for p in parts for x in p[k]] for k in ("boxes", "labels")}
    merged |= {k: torch.cat([p[k] for p in parts]) for k in ("image", "index")}
    assert equal(whole, merged)


@pytest.mark.parametrize("name", ["detection_v0", "detection_v3"])
def test_a_policy_augments_image_boxes_and_labels_together(name):
    data = Scenes(size=30)
    augment = PolicyAugment(Policy.load(name))
    keys = [(0, i) for i in range(30)]
    batch = KeyedBoxes(data, augment).__getitems__(keys)
    again = KeyedBoxes(data, augment).__getitems__(keys[::-1])
    assert all(torch.equal(batch["boxes"][i], again["boxes"][29 - i]) for i in range(30))
    assert torch.equal(batch["image"], again["image"].flip(0))
    assert batch["image"].shape == (30, 3, 64, 64)
    assert sum(not torch.equal(batch["image"][i], data[i]["image"]) for i in range(30)) > 10
    for boxes, labels, i in zip(batch["boxes"], batch["labels"], range(30), strict=True):
        assert len(boxes) == len(labels)
        assert set(labels.tolist()) <= set(data[i]["labels"].tolist())
        assert ((boxes >= 0) & (boxes <= 64)).all()


@pytest.mark.parametrize(
    "policy",
    [
        "detection_v0",
        "detection_v1",
        "detection_v2",
        "detection_v3",
        pytest.param(RandAugment(3, 20), id="RandAugment"),
    ],
)
def test_a_batch_with_boxes_is_augmented_as_its_images_are(policy):
    """Bit for bit, images, boxes and labels, what the policy gives image by image."""
    augment = PolicyAugment(policy if isinstance(policy, RandAugment) else Policy.load(policy))
    keys = [(epoch, i) for epoch in (0, 1) for i in range(30)]
    data = Scenes(size=30)

    def alone(image, boxes, labels, generator):
        return augment(image, boxes, labels, generator)

    one_by_one = KeyedBoxes(data, alone, seed=4).__getitems__(keys)
    assert equal(KeyedBoxes(data, augment, seed=4).__getitems__(keys), one_by_one)


def test_images_of_unequal_size_come_as_a_list(layout):
    Image.new("RGB", (6, 7)).save(layout / "JPEGImages/c.png")
    batch = KeyedBoxes(voc(layout)).__getitems__([(0, 0), (0, 2)])
    assert [tuple(x.shape) for x in batch["image"]] == [(3, 10, 20), (3, 7, 6)]
    module = DetectionDataModule(voc(layout), voc(layout), batch_size=2)
    floats = module.on_after_batch_transfer(batch, 0)["image"]
    assert torch.equal(floats[1], to_float(batch["image"][1]))


def test_the_module_reads_each_test_image_once_and_workers_change_nothing():
    sets = {"train": lambda: Scenes(size=30), "test": lambda: Scenes("test", size=11)}
    one, two = (
        DetectionDataModule(**sets, batch_size=8, augment=jitter, num_workers=n, image_size=64)
        for n in (0, 2)
    )
    one.check()
    assert torch.cat([b["index"] for b in one.val_dataloader()]).tolist() == list(range(11))
    pairs = zip(one.train_dataloader(), two.train_dataloader(), strict=False)
    assert all(equal(a, b) for (a, b), _ in zip(pairs, range(6), strict=False))
    batch = one.on_after_batch_transfer(next(iter(one.val_dataloader())), 0)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 31}, "data.batch_size=31"),
        ({"image_size": 32}, "data.image_size=32, but the training images have image_size 64"),
        ({"num_classes": 3}, "data.num_classes=3, but the training images have num_classes 10"),
        ({"num_workers": -1}, "data.num_workers=-1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        DetectionDataModule(Scenes(size=30), Scenes("test", size=5), **({"batch_size": 2} | options)).check()


def test_classes_that_differ(layout):
    with pytest.raises(ConfigError, match=r"Training classes .* and test classes .* differ"):
        DetectionDataModule(voc(layout), voc(layout, classes=["dog", "cat"]), batch_size=1).check()


@pytest.mark.skipif(not REAL.exists(), reason="bccd-voc.zip is not here")
def test_bccd():
    sizes = {split: len(voc(REAL, split, scan=False)) for split in ("train", "val", "test", "trainval")}
    assert sizes["train"] + sizes["val"] == sizes["trainval"]
    assert sizes["trainval"] + sizes["test"] == 364
    data = voc(REAL, "test", image_size=96)
    assert data.classes == ["Platelets", "RBC", "WBC"]
    boxes = torch.cat([data[i]["boxes"] for i in range(len(data))])
    assert boxes.min() >= 0
    assert boxes.max() <= 96
    assert data.skipped == {}
    assert data.dropped == []


def test_a_transform_with_a_policy_moves_the_boxes_too():
    """`augment=` gives the same transform to images alone and to images with boxes: 150/331 of 64 pixels are
    29, left or right, for both."""
    policy = Policy([[["TranslateX", 1.0, 9]]], "classification", min_visibility=0.0)
    module = DetectionDataModule(Scenes("train", 12), Scenes("test", 4), 4, augment=AutoAugment(policy))
    module.check()
    batch, signs = module.keyed_train().__getitems__([(0, i) for i in range(12)]), set()
    for i in range(12):
        item = module.train[i]
        left = bool((batch["image"][i][:, :, 35:] == 128).all())
        signs.add(left)
        shown = batch["image"][i][:, :, :35] if left else batch["image"][i][:, :, 29:]
        assert torch.equal(shown, item["image"][:, :, 29:] if left else item["image"][:, :, :35])
        moved = item["boxes"] + torch.tensor([-29.0 if left else 29.0, 0] * 2)
        inside = moved.clamp(0, 64)
        inside = inside[inside[:, 2] > inside[:, 0]]
        torch.testing.assert_close(batch["boxes"][i], inside)
    assert signs == {True, False}


def test_an_augmentation_that_cannot_move_boxes_is_refused_before_the_training():
    module = DetectionDataModule(Scenes("train", 12), Scenes("test", 4), 4, augment=AutoAugment(AugMix()))
    with pytest.raises(ConfigError, match="geometric=False"):
        module.check()


def test_a_mosaic_of_the_set_depends_on_the_key_alone():
    """Four images of the set by (seed, epoch, index), whatever the batch; labels follow their boxes."""
    mosaic = AutoAugment(Policy([[["Mosaic", 1, 10]]]))
    data = DetectionDataModule(Scenes("train", 12), Scenes("test", 4), batch_size=4, augment=mosaic, seed=3)
    data.check()
    keyed, keys = data.keyed_train(), [(0, 7), (2, 0), (0, 1), (1, 7)]
    whole = keyed.__getitems__(keys)
    for i, k in enumerate(keys):
        assert all(torch.equal(keyed[k][name][0], whole[name][i]) for name in ("image", "boxes", "labels"))
    assert not torch.equal(whole["image"][0], whole["image"][3])
    policy, item = mosaic.policy, keyed.dataset[7]
    chosen = torch.randint(12, (3,), generator=keyed_generator(3, "partner", 0, 7))
    others = [keyed.dataset[i] for i in chosen.tolist()]
    counts = [len(x["boxes"]) for x in (item, *others)]
    draws = policy.sample(sum(counts), keyed_generator(3, "augment", 0, 7))
    image, boxes, keep = policy.apply(item["image"], item["boxes"], draws, partner=others)
    labels = torch.cat([x["labels"] for x in (item, *others)])
    assert torch.equal(image, whole["image"][0]) and torch.equal(boxes[keep], whole["boxes"][0])
    assert torch.equal(labels[keep], whole["labels"][0]) and not keep.all()
