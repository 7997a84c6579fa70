"""Few-shot data: disjoint classes, independent pairs, fixed examples, the official lists and crops."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_gen.data.fewshot import (
    KeyedPairs,
    examples,
    read_list,
    select_classes,
    split_classes,
)
from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.data.folders import ImageFiles
from lit_gen.data.glyphs import Glyphs
from lit_gen.data.images import TensorImages
from lit_gen.data.transforms import CenterCrop, Compose, Flip, RandomCrop
from lit_gen.errors import ConfigError
from lit_gen.images import to_float

REAL = Path("/work/shared/data")
CLASSES = [f"c{i}" for i in range(12)]


def images(per_class: int = 5, classes: list[str] = CLASSES, size: int = 4) -> TensorImages:
    """Image i is flat and of value i."""
    n = per_class * len(classes)
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, size, size).clone()
    return TensorImages(pixels, torch.arange(len(classes)).repeat_interleave(per_class), classes)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), seed=st.integers(0, 99), data=st.data())
def test_source_and_target_divide_the_classes(n, seed, data):
    classes = [f"k{i}" for i in range(n)]
    number = data.draw(st.integers(1, n - 1))
    source, target = split_classes(classes, number, seed=seed)
    assert sorted(source + target) == sorted(classes)
    assert len(target) == number
    fraction = split_classes(classes, number / n, seed=seed)
    assert fraction == (source, target)
    assert split_classes(classes, target) == (source, target)


def test_a_class_that_is_added_moves_few_others():
    before, after = set(split_classes(CLASSES, 4)[1]), set(split_classes([*CLASSES, "new"], 4)[1])
    assert len(before & after) >= 3


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (12, None, "target=12: give a number below the 12"),
        (0, None, "target=0"),
        (1.0, None, "target=1.0"),
        (["c1", "dog"], None, "Unknown class 'dog'; the 12 there are begin with c0, c1"),
        (["c1"], ["c1", "c2"], "Class 'c1' is both source and target"),
        (["c1"], [], "0 source and 1 target classes"),
        ([], None, "12 source and 0 target"),
    ],
)
def test_splits_that_are_none(target, source, message):
    with pytest.raises(ConfigError, match=message):
        split_classes(CLASSES, target, source)


def test_selected_classes_get_numbers_of_their_own():
    chosen = select_classes(images(), ["c7", "c2"])
    assert chosen.classes == ["c7", "c2"]
    assert chosen.labels.tolist() == [1] * 5 + [0] * 5
    assert chosen.indices.tolist() == [*range(10, 15), *range(35, 40)]
    assert chosen[0]["image"][0, 0, 0] == 10
    assert chosen.of_class(0).tolist() == [5, 6, 7, 8, 9]
    assert chosen.fingerprint() != select_classes(images(), ["c2", "c7"]).fingerprint()
    with pytest.raises(ConfigError, match="Few-shot data need classes"):
        select_classes(TensorImages(torch.zeros(3, 1, 4, 4, dtype=torch.uint8)), [])


def test_every_image_serves_once_an_epoch_on_either_side_and_independently():
    """In an epoch both orders are permutations; over epochs a pair of classes is as frequent as chance
    says."""
    data = images(5, CLASSES[:4])
    pairs = KeyedPairs(data, seed=3)
    count: Counter = Counter()
    for epoch in range(300):
        partners = [pairs.partner(epoch, i) for i in range(20)]
        assert sorted(partners) == list(range(20))
        count.update((i // 5, j // 5) for i, j in enumerate(partners))
    expected = 300 * 20 / 16
    chi2 = sum((count[a, b] - expected) ** 2 / expected for a in range(4) for b in range(4))
    assert chi2 < 30  # 9 degrees of freedom, p < 0.0005
    assert min(count.values()) > 0  # pairs of one class are allowed, as in the official code


def test_the_same_class_target_is_another_image_of_the_contents_class():
    """Never the content image itself, every other one of its class about equally often."""
    data = images(5, CLASSES[:3])
    pairs = KeyedPairs(data, seed=2, same_class_target=True)
    count = Counter(pairs.sibling(epoch, 7) for epoch in range(400))
    assert set(count) == {5, 6, 8, 9} and min(count.values()) > 60  # 100 expected, deviation 8.7
    batch = pairs.__getitems__([(0, 7), (3, 12)])
    siblings = [pairs.sibling(0, 7), pairs.sibling(3, 12)]
    assert torch.equal(batch["same_class"], torch.stack([data[i]["image"] for i in siblings]))
    with pytest.raises(ConfigError, match=r"Class 'c0' has 1 images; data\.same_class_target=true needs 2"):
        KeyedPairs(images(1), same_class_target=True)


def test_style_images_are_others_of_the_contents_class():
    """Each of them once, never the content image itself, all equally often, whatever else is in the batch."""
    data = images(5, CLASSES[:3])
    pairs = KeyedPairs(data, seed=2, style_images=3)
    drawn = [pairs.style_numbers(epoch, 7) for epoch in range(400)]
    assert all(len(set(some)) == 3 for some in drawn)
    count = Counter(i for some in drawn for i in some)
    assert set(count) == {5, 6, 8, 9} and min(count.values()) > 260  # 300 expected, deviation 8.7
    batch = pairs.__getitems__([(0, 7), (3, 12)])
    assert torch.equal(batch["style"][1:], pairs.__getitems__([(3, 12)])["style"])
    assert batch["style"][0, :, 0, 0, 0].tolist() == pairs.style_numbers(0, 7)
    assert "same_class" not in batch
    with pytest.raises(ConfigError, match="style_images=5 needs 6 of each"):
        KeyedPairs(data, style_images=5)


def test_the_content_view_is_the_augmented_content():
    """The same for the same (seed, epoch, index), and the content itself stays as it is."""
    data = images()
    augment = lambda image, g: (image + torch.randint(1, 9, (), generator=g)).to(torch.uint8)  # noqa: E731
    keys = [(0, 5), (1, 5), (2, 50)]
    pairs = KeyedPairs(data, seed=1, content_augment=augment)
    batch = pairs.__getitems__(keys)
    assert torch.equal(batch["content"], KeyedPairs(data, seed=1).__getitems__(keys)["content"])
    moved = (batch["content_view"].int() - batch["content"].int()) % 256
    assert ((moved == moved[:, :1, :1, :1]) & (moved > 0)).all()
    assert torch.equal(batch["content_view"][2:], pairs.__getitems__(keys[2:])["content_view"])


def test_a_batch_of_pairs_depends_on_keys_alone():
    data = images()
    shift = lambda image, g: (image + torch.randint(0, 9, (), generator=g)).to(torch.uint8)  # noqa: E731
    keys = [(0, 5), (0, 9), (1, 5), (2, 59)]
    whole = KeyedPairs(data, shift, seed=1).__getitems__(keys)
    parts = [KeyedPairs(data, shift, seed=1).__getitems__([k]) for k in keys]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([p[name] for p in parts])), name
    assert whole["content_label"].tolist() == [data.labels[i] for _, i in keys]
    assert whole["class_label"].tolist() == [data.labels[i] for i in whole["class_index"]]
    assert whole["content"].shape == whole["classes"].shape == (4, 1, 4, 4)


def test_examples_are_fixed_by_the_seed_and_nested_in_k():
    data = images()
    five, _ = examples(data, 5, seed=2)
    three, _ = examples(data, 3, seed=2)
    for name in CLASSES:
        assert torch.equal(three[name], five[name][:3])
        assert sorted(five[name].tolist()) == data_of(data, name)
    assert any(not torch.equal(three[c], examples(data, 3, seed=3)[0][c]) for c in CLASSES)


def data_of(data: TensorImages, name: str) -> list[int]:
    return (data.labels == data.classes.index(name)).nonzero()[:, 0].tolist()


def test_classes_with_too_few_images_are_named_or_left_out():
    data = TensorImages(
        torch.zeros(7, 1, 4, 4, dtype=torch.uint8), torch.tensor([0] * 5 + [1] * 2), ["many", "few"]
    )
    with pytest.raises(ConfigError, match="Class 'few' has 2 images, k=3 are asked for"):
        examples(data, 3)
    chosen, left_out = examples(data, 3, on_error="skip")
    assert list(chosen) == ["many"]
    assert left_out == {"few": 2}
    with pytest.raises(ConfigError, match="on_error='hide'"):
        examples(data, 3, on_error="hide")
    with pytest.raises(ConfigError, match="k=0"):
        examples(data, 0)


def test_the_module_keeps_target_classes_out_of_training():
    module = FewShotDataModule(images(), target=3, batch_size=9)
    module.check()
    assert module.classes == module.train.classes + module.test.classes
    batches = iter(module.train_dataloader())
    seen = {
        int(v)
        for _ in range(20)
        for b in [next(batches)]
        for x in ("content", "classes")
        for v in b[x][:, 0, 0, 0]
    }
    assert seen == set(module.train.indices.tolist())
    assert not seen & set(module.test.indices.tolist())
    targets = list(module.val_dataloader())
    assert torch.cat([b["image"] for b in targets])[:, 0, 0, 0].tolist() == module.test.indices.tolist()


def test_batches_arrive_as_floats_with_their_labels():
    module = FewShotDataModule(images(), target=3, batch_size=4)
    raw = next(iter(module.train_dataloader()))
    batch = module.on_after_batch_transfer(raw, 0)
    assert torch.equal(batch["content"], to_float(raw["content"]))
    assert batch["class_label"].dtype == torch.int64
    assert set(batch) == {"content", "classes", "content_label", "class_label", "index", "class_index"}


def test_workers_change_nothing():
    one, two = (FewShotDataModule(images(), 3, batch_size=6, augment=Flip(), num_workers=n) for n in (0, 2))
    for (a, b), _ in zip(
        zip(one.train_dataloader(), two.train_dataloader(), strict=False), range(12), strict=False
    ):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_contents_are_all_source_images_before_any_returns():
    module = FewShotDataModule(images(), target=2, batch_size=4)
    n = len(module.train)
    drawn = module.contents(n + 7)
    assert sorted(drawn[:n].tolist()) == list(range(n))
    assert torch.equal(module.contents(10), drawn[:10])
    assert module.contents(0).tolist() == []


def test_the_official_crops(tmp_path):
    """Flip and a random 8 x 8 window of the 10-pixel image in training, the centre window everywhere else."""
    pixels = torch.randint(
        0, 256, (12, 1, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    data = TensorImages(pixels, torch.arange(4).repeat_interleave(3), list("abcd"))
    train = Compose([Flip(), RandomCrop(8)])
    module = FewShotDataModule(
        data, 1, batch_size=9, augment=train, view=CenterCrop(8), image_size=8, channels=1, num_classes=3
    )
    module.check()
    assert torch.equal(module.train[0]["image"], pixels[int(module.train.indices[0]), :, 1:9, 1:9])
    batch = next(iter(module.train_dataloader()))
    for image, i in zip(batch["content"], batch["index"], strict=True):
        source = pixels[int(module.train.indices[i])]
        windows = [
            f[:, y : y + 8, x : x + 8] for f in (source, source.flip(-1)) for y in range(3) for x in range(3)
        ]
        assert any(torch.equal(image, w) for w in windows)
    with pytest.raises(ConfigError, match=r"data\.num_classes=4, but the training images have num_classes 3"):
        FewShotDataModule(data, 1, batch_size=2, num_classes=4).check()


@pytest.fixture
def folder(tmp_path):
    for c in "zya":
        (tmp_path / "set" / c).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (6, 4), (i, ord(c), 0)).save(tmp_path / "set" / c / f"{i}.png")
    return tmp_path / "set"


def write(path: Path, *names: str) -> str:
    path.write_text("\n".join(names) + "\n")
    return str(path)


def test_official_list_files(folder, tmp_path):
    lists = (
        write(tmp_path / "train.txt", "z/1.png", "a/3.png", "z/0.png"),
        write(tmp_path / "test.txt", "y/2.png"),
    )
    files = ImageFiles(folder, image_size=4, fit="shorter")
    module = FewShotDataModule(
        files, train_list=lists[0], test_list=lists[1], batch_size=2, view=CenterCrop(4)
    )
    assert module.train.classes == ["a", "z"]  # the sorted folders of that list
    assert module.train.labels.tolist() == [1, 0, 1]
    assert [int(module.train[i]["image"][0, 0, 0]) for i in range(3)] == [1, 3, 0]
    assert module.test.classes == ["y"]
    assert module.train[0]["image"].shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["z/1.png", "z/9.png"], r"train\.txt: z/9\.png is not in .*set \(1 of 2 are missing\)"),
        (["picture.png"], "'picture.png' is not of the form class/image"),
        ([], "names no image"),
        (["y/1.png"], r"Class 'y' is in both .*train\.txt and .*test\.txt"),
    ],
)
def test_bad_lists(folder, tmp_path, lines, message):
    lists = write(tmp_path / "train.txt", *lines), write(tmp_path / "test.txt", "y/2.png")
    files = ImageFiles(folder, image_size=4)
    with pytest.raises(ConfigError, match=message):
        FewShotDataModule(files, train_list=lists[0], test_list=lists[1], batch_size=1).check()
    with pytest.raises(ConfigError, match="train_list and test_list go together"):
        FewShotDataModule(files, train_list=lists[0])
    with pytest.raises(ConfigError, match="not a readable list"):
        read_list(tmp_path / "nowhere.txt")


def test_glyphs_know_the_true_translation():
    faces = ["DejaVuSans", "DejaVuSerif", "cmr10", "cmtt10", "STIXGeneral/fraktur"]
    glyphs = Glyphs(32, channels=3, classes=faces)
    module = FewShotDataModule(lambda: glyphs, target=2, batch_size=8)
    content = int(module.contents(1))
    letter = module.train[content]["content"]
    target = module.test.classes[1]
    assert torch.equal(module.truth(content, target), glyphs[faces.index(target) * 52 + letter]["image"])
    assert FewShotDataModule(images(), 2, batch_size=2).truth(0, "c1") is None
    shown, _ = module.examples(5)
    assert {c: tuple(x.shape) for c, x in shown.items()} == dict.fromkeys(module.test.classes, (5, 3, 32, 32))


@pytest.mark.parametrize(("name", "classes"), [("grocery-64.zip", 81), ("omniglot-small1.zip", 136)])
def test_real_sets(name, classes):
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not here")
    files = ImageFiles(REAL / name, image_size=64, scan=False)
    module = FewShotDataModule(files, target=0.2, batch_size=4)
    assert len(module.test.classes) == round(0.2 * classes)
    assert len(module.classes) == classes
    shown, _ = module.examples(5)
    assert all(x.shape == (5, 3, 64, 64) for x in shown.values())


def test_small_classes_and_unreadable_images_are_counted(tmp_path):
    """on_error=skip leaves out target classes of fewer than K images, and counts them and the images."""
    for name, n in {"a": 4, "b": 4, "few": 2, "many": 5}.items():
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "bad.png").write_text("no image")
    files = ImageFiles(tmp_path, image_size=8, on_error="skip")
    chosen = {"target": ["few", "many"], "batch_size": 2}
    data = FewShotDataModule(files, on_error="skip", **chosen)
    with pytest.warns(UserWarning, match=r"1 unreadable images are left out, a/bad.png"):
        data.check()
    with pytest.warns(UserWarning, match=r"1 target classes have fewer than 3 images: few \(2\)"):
        shown, left_out = data.examples(3)
    assert list(shown) == ["many"] and left_out == {"few": 2}
    with pytest.raises(ConfigError, match=r"No target class has k=6 images; the largest has 5"):
        data.examples(6)
    with pytest.raises(ConfigError, match=r"'few' has 2 images, k=3 .*data.on_error=skip"):
        FewShotDataModule(files, **chosen).examples(3)
    with pytest.raises(ConfigError, match="on_error='hide'"):
        FewShotDataModule(files, on_error="hide", **chosen)
