"""The torchvision transform: structures in and out, dropped boxes with their labels, pickling, workers,
ranks, keys."""

import copy
import pickle
from pathlib import Path

import PIL.Image
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from lit_gen import rng
from lit_gen.augment import AugMix, AutoAugment, Policy, RandAugment, Views, augmix_loss, jensen_shannon
from lit_gen.augment.sheet import policy_sheet
from lit_gen.data.detection_module import PolicyAugment
from lit_gen.data.keyed import KeyedDataset
from lit_gen.errors import ConfigError

IMAGE = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=rng.keyed_generator("transform"))
BOXES = torch.tensor([[2.0, 3, 12, 30], [40, 10, 58, 36], [20, 20, 30, 25]])
LEFT = Policy([[["TranslateX_BBox", 1.0, 10]]])  # by 250/640 of the longer side: 23 of 60 pixels, either way


def sample_of(box_format: str = "XYXY") -> dict:
    boxes = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(40, 60))
    masks = torch.zeros(3, 40, 60, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, BOXES.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return {
        "image": tv_tensors.Image(IMAGE),
        "target": {
            "boxes": v2.functional.convert_bounding_box_format(boxes, new_format=box_format),
            "labels": torch.tensor([5, 6, 7]),
            "masks": tv_tensors.Mask(masks),
            "names": ["a", "b", "c"],
        },
        "index": 3,
    }


@pytest.mark.parametrize("box_format", ["XYXY", "XYWH", "CXCYWH"])
def test_boxes_masks_and_labels_stay_together(box_format):
    transform = AutoAugment(LEFT, per_box=("labels", "masks", "names"))
    given = sample_of(box_format)
    untouched = copy.deepcopy(given)
    for i in range(10):
        out = transform.augment(given, rng.keyed_generator(i))
        target = out["target"]
        moved_left = len(target["labels"]) == 2 and target["labels"].tolist() == [6, 7]
        assert moved_left or target["labels"].tolist() == [5, 7]
        assert target["names"] == (["b", "c"] if moved_left else ["a", "c"])
        assert isinstance(out["image"], tv_tensors.Image) and isinstance(target["masks"], tv_tensors.Mask)
        assert target["boxes"].format == tv_tensors.BoundingBoxFormat[box_format]
        corners = v2.functional.convert_bounding_box_format(target["boxes"], new_format="XYXY").as_subclass(
            torch.Tensor
        )
        for mask, (x0, y0, x1, y1) in zip(target["masks"], corners.tolist(), strict=True):
            ys, xs = mask.nonzero().unbind(1)
            assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == [x0, y0, x1, y1]
    assert torch.equal(given["image"], untouched["image"])
    assert torch.equal(given["target"]["boxes"], untouched["target"]["boxes"])


def test_without_drop_nothing_is_lost():
    out = AutoAugment(LEFT, drop=False).augment(sample_of(), rng.keyed_generator(0))
    assert len(out["target"]["boxes"]) == len(out["target"]["labels"]) == 3


def test_boxes_outside_a_dict():
    boxes = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(40, 60))
    keep_all = AutoAugment(Policy([[["Equalize", 1.0, 5]]]))
    _, moved, label = keep_all(IMAGE, boxes, torch.tensor([1, 2, 3]))
    assert torch.equal(moved, boxes) and label.tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match="into one dict"):
        AutoAugment(LEFT)(IMAGE, boxes)


def test_kinds_of_images():
    """PIL in, PIL out; grey and RGB; plain tensors; batches with draws per image."""
    policy = RandAugment(magnitude=20)
    transform = AutoAugment(policy)
    pil = transform(PIL.Image.new("RGB", (20, 10), (200, 10, 50)))
    assert isinstance(pil, PIL.Image.Image) and pil.size == (20, 10) and pil.mode == "RGB"
    assert transform(PIL.Image.new("L", (20, 10))).mode == "L"
    assert type(transform(IMAGE)) is torch.Tensor
    batch = IMAGE[None].expand(16, 3, 40, 60)
    out = transform.augment(batch, rng.keyed_generator(1))
    assert torch.equal(
        out, policy.apply_batch(batch, None, policy.sample_batch(16, rng.keyed_generator(1)))[0]
    )
    assert len({row.numpy().tobytes() for row in out}) > 8
    composed = v2.Compose([transform, v2.ToDtype(torch.float32, scale=True)])
    assert composed(IMAGE).dtype == torch.float32


def test_a_generator_may_be_the_last_input():
    transform = AutoAugment("detection_v2")
    for i in range(5):
        with_key = transform(IMAGE, rng.keyed_generator(i))
        assert torch.equal(with_key, transform.augment(IMAGE, rng.keyed_generator(i)))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "conf" / "augment").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_configs_make_what_a_data_module_takes(path, tmp_path):
    """conf/augment: (image, generator) -> image; those with a policy also move boxes, if the policy can."""
    config = OmegaConf.load(path)
    if path.stem == "file":
        mine = tmp_path / "mine.yaml"
        mine.write_text(Policy.load("detection_v1").to_yaml())
        config = OmegaConf.merge(config, {"policy": {"source": str(mine)}})
    augment, g = instantiate(config), rng.keyed_generator(0)
    if getattr(augment, "needs_partner", False):
        item = {"image": IMAGE, "boxes": BOXES, "labels": torch.tensor([1, 2, 3])}
        out = PolicyAugment(augment.policy)(*item.values(), g, [item] * augment.policy.partners)
        assert out[0].shape == IMAGE.shape and len(out[1]) == len(out[2])
        return
    image = augment(IMAGE, g)
    if hasattr(augment, "policy") and path.stem != "augmix":
        moved, boxes, labels = PolicyAugment(augment.policy)(IMAGE, BOXES, torch.tensor([1, 2, 3]), g)
        assert len(boxes) == len(labels) and moved.shape == IMAGE.shape
    assert image.shape == IMAGE.shape and image.dtype == torch.uint8


def test_bad_samples_are_named():
    transform = AutoAugment("detection_v0")
    with pytest.raises(ConfigError, match="uint8"):
        transform(IMAGE.float())
    with pytest.raises(ConfigError, match="found 0"):
        transform({"label": 3})
    with pytest.raises(ConfigError, match="found 2"):
        transform([IMAGE, IMAGE])
    with pytest.raises(ConfigError, match="Video"):
        transform(tv_tensors.Video(IMAGE[None]), IMAGE)
    with pytest.raises(ConfigError, match="Mosaic"):
        AutoAugment(Policy([[["Mosaic", 1, 5]]]))(sample_of())
    with pytest.raises(ConfigError, match="policy object"):
        AutoAugment(LEFT, fill=0)
    with pytest.raises(ConfigError, match="geometric=False"):
        AutoAugment(AugMix())(sample_of())
    with pytest.raises(ConfigError, match="apply_batch"):
        transform(IMAGE[None], tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(40, 60)))


def test_pickle_keeps_the_behaviour():
    transform = AutoAugment("detection_v3", fill=7)
    again = pickle.loads(pickle.dumps(transform))
    for i in range(8):
        a, b = (t.augment(sample_of(), rng.keyed_generator(i)) for t in (transform, again))
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["target"]["boxes"], b["target"]["boxes"])


class Constant(Dataset):
    """The same image at every index, augmented; keyed by (seed, index) if there is a seed."""

    def __init__(self, seed: int | None = None):
        self.transform, self.seed = AutoAugment(RandAugment(magnitude=25)), seed

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        key = None if self.seed is None else rng.keyed_generator(self.seed, "augment", 0, index)
        return self.transform.augment(IMAGE, key)


def epoch(dataset: Dataset, workers: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.cat(list(DataLoader(dataset, batch_size=4, num_workers=workers)))


def test_workers_draw_different_numbers_and_the_same_seed_the_same_data():
    first, again, other = (epoch(Constant(), 2, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) > 18  # a few draws coincide (identity, flat ops)
    keyed = [epoch(Constant(seed=3), workers, seed) for workers, seed in ((0, 0), (2, 1))]
    assert torch.equal(*keyed)


def test_ranks_seeded_alike_draw_different_numbers(monkeypatch):
    transform, out = AutoAugment(RandAugment(magnitude=25)), []
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        torch.manual_seed(0)
        out.append(torch.stack([transform(IMAGE) for _ in range(6)]))
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])


def test_views_and_the_divergence():
    """Equal views have divergence 0, k disjoint certainties log k; clean cross-entropy plus 12 times it is
    the loss."""
    views = Views(AutoAugment(AugMix()), copies=2)(IMAGE)
    assert views.shape == (3, *IMAGE.shape) and torch.equal(views[0], IMAGE)
    keyed = [Views(AutoAugment(AugMix()))(IMAGE, rng.keyed_generator(4)) for _ in range(2)]
    assert torch.equal(*keyed) and not torch.equal(keyed[0][1], keyed[0][2])
    logits = torch.randn(5, 4, generator=rng.keyed_generator(0))
    torch.testing.assert_close(jensen_shannon([logits] * 3), torch.tensor(0.0), atol=1e-6, rtol=0)
    certain = [100.0 * torch.eye(3)[[i] * 5] for i in range(3)]
    torch.testing.assert_close(jensen_shannon(certain), torch.tensor(3.0).log())
    target = torch.tensor([0, 1, 2, 3, 0])
    loss = augmix_loss([logits, logits, logits], target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target), atol=1e-5, rtol=0)


def test_augmix_is_the_stated_mixture():
    policy = AugMix()
    draws = {
        "mix": 0.25,
        "weights": [0.5, 0.3, 0.2],
        "chains": [[{"op": "Solarize", "magnitude": 0}], [], []],
    }
    out, _, _ = policy.apply(IMAGE, None, draws)
    expected = 0.75 * IMAGE + 0.25 * (0.5 * (255.0 - IMAGE) + 0.5 * IMAGE)
    assert (out - expected).abs().max() <= 0.5 + 1e-4


def test_sheet_shows_rows_of_draws():
    """The first picture is the image; a policy that does nothing repeats it in every place."""
    nothing = Policy([[["Color", 0.0, 5]], [["Equalize", 0.0, 5]]])
    sheet = policy_sheet(nothing, IMAGE, columns=3, generator=rng.keyed_generator(0))
    assert sheet.dtype == torch.uint8 and sheet.shape == (3, 4 + 40 + 2 * (12 + 40 + 4) + 4, 4 + 3 * 64)
    assert torch.equal(sheet[:, 4:44, 4:64], IMAGE)
    for top in (4 + 40 + 4 + 12, 4 + 40 + 4 + 12 + 56):
        for left in (4, 68, 132):
            assert torch.equal(sheet[:, top : top + 40, left : left + 60], IMAGE)
    boxed = policy_sheet(nothing, IMAGE, BOXES, columns=1)
    assert boxed[:, 4 + 3, 4 + 2].tolist() == [64, 255, 64]
    small = policy_sheet(nothing, IMAGE, BOXES, columns=3, scale=2, largest=30)  # 20 x 30 each, boxes halved
    assert small.shape == (3, 4 + 20 + 2 * (12 + 20 + 4) + 4, 4 + 3 * 34)
    assert small[:, 4 + 5, 4 + 20].tolist() == [64, 255, 64]  # the corner (40, 10) of the second box
    long = Policy([[["TranslateY_Only_BBoxes", 1.0, 10]] * 3])
    assert policy_sheet(long, IMAGE, columns=1).shape[2] > 3 * len("TranslateY_Only_BBoxes 1 10") * 5
    with pytest.raises(ConfigError, match="columns"):
        policy_sheet(nothing, IMAGE, columns=0)


def test_sample_pairing_finds_its_partner():
    """A lone image says what is missing; beside one it is mixed, in a data module with the same partner
    however the work is cut; boxes and the sheet as with any policy."""
    policy = Policy([[["SamplePairing", 1.0, 9]]], "classification")
    transform = AutoAugment(policy)
    with pytest.raises(ConfigError, match="second image"):
        transform(IMAGE)
    with pytest.raises(ConfigError, match="one size"):
        transform.augment(IMAGE, None, IMAGE[:, :20])
    mixed = transform.augment(IMAGE, None, torch.zeros_like(IMAGE))
    assert torch.equal(mixed, (IMAGE.float() * 0.6).round().to(torch.uint8))
    moved = AutoAugment(Policy([[["TranslateX", 1.0, 3], ["SamplePairing", 1.0, 9]]], "classification"))
    sample = moved.augment(sample_of(), rng.keyed_generator(0), torch.zeros_like(IMAGE))
    alone = AutoAugment(Policy([[["TranslateX", 1.0, 3]]], "classification"))
    expected = alone.augment(sample_of(), rng.keyed_generator(0))
    assert torch.equal(sample["target"]["boxes"], expected["target"]["boxes"])
    assert policy_sheet(policy, IMAGE, columns=4).shape == policy_sheet(LEFT, IMAGE, columns=4).shape

    class Flat:
        image_size, channels, classes = 8, 1, ["a"]

        def __len__(self):
            return 6

        def __getitem__(self, i):
            return {"image": torch.full((1, 8, 8), 40 * i, dtype=torch.uint8), "label": 0}

    keyed = KeyedDataset(Flat(), transform, seed=3)
    keys = [(0, 5), (0, 2), (1, 5), (1, 0)]
    whole = keyed.__getitems__(keys)["image"]
    assert torch.equal(whole, torch.cat([keyed[k]["image"] for k in keys]))
    left = [round(float(x[0, 0, 0] - 0.6 * 40 * i) / 0.4) for x, (_, i) in zip(whole, keys, strict=True)]
    assert all(v % 40 == 0 and 0 <= v <= 200 for v in left)
