"""Ops that take other images: each box is the box of its moved pixels, masks and points go with it, labels of
lost boxes go; draws are plain data, and a batch is its images one by one."""

import json

import pytest
import torch

from lit_gen import rng
from lit_gen.augment import Chain, Policy, RandAugment
from lit_gen.augment.layers import box_weights, in_batch
from lit_gen.errors import ConfigError

H, W = 48, 64
MIXING = ("Mosaic", "CopyPaste", "MixUp", "CutMix", "ResizedCrop")
SEEDS = range(8)


def policy_of(name: str, **options) -> Policy:
    return Policy([[[name, 1, 8]]], fill=0, **options)


def scene(key: int, h: int = H, w: int = W) -> dict[str, torch.Tensor]:
    """Three rectangles apart, one for each third of the width; a disk in each is its mask, its center a
    point."""
    g = rng.keyed_generator("mixing", key)
    boxes, masks, points = [], [], []
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    for k in range(3):
        rx, ry = (int(torch.randint(4, side // 7, (), generator=g)) for side in (w, h))
        cx = (2 * k + 1) * w // 6 + int(torch.randint(-1, 2, (), generator=g))
        cy = int(torch.randint(ry + 1, h - ry - 1, (), generator=g))
        boxes.append([cx - rx, cy - ry, cx + rx + 1, cy + ry + 1])
        masks.append(((x - cx) / (rx + 0.01)) ** 2 + ((y - cy) / (ry + 0.01)) ** 2 <= 1)
        points.append([cx, cy])
    return {
        "image": torch.zeros(3, h, w, dtype=torch.uint8),
        "boxes": torch.tensor(boxes).float(),
        "masks": torch.stack(masks),
        "points": torch.tensor(points).float(),
    }


def painted(scenes: list[dict], of: int, where: torch.Tensor) -> list[dict]:
    """The scenes, one of them white where bool (H, W) says."""
    out = [dict(s) for s in scenes]
    out[of]["image"] = out[of]["image"].masked_fill(where, 255)
    return out


def extent(mask: torch.Tensor) -> torch.Tensor:
    y, x = mask.nonzero().unbind(1)
    return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


def rectangle(box: torch.Tensor) -> torch.Tensor:
    x0, y0, x1, y1 = box.int().tolist()
    out = torch.zeros(H, W, dtype=torch.bool)
    out[y0:y1, x0:x1] = True
    return out


def applied(policy: Policy, scenes: list[dict], draws: dict, *names: str):
    """image, boxes, keep[, masks][, points] of the first scene with the others as its partners."""
    others = [{k: s[k] for k in ("image", "boxes", *names)} for s in scenes[1:]]
    first = {k: scenes[0][k] for k in names}
    return policy.apply(scenes[0]["image"], scenes[0]["boxes"], draws, partner=others, **first)


@pytest.mark.parametrize("name", MIXING)
def test_each_box_is_the_box_of_its_moved_pixels(name):
    """One object of one image is painted at a time, under the same draws; to the pixel where nothing is
    resampled."""
    policy, kept = policy_of(name), 0
    slack = 1.0 if name in ("Mosaic", "ResizedCrop") else 0.0
    for seed in SEEDS:
        scenes = [scene(10 * seed + i) for i in range(1 + policy.partners)]
        draws = policy.sample(3 * len(scenes), rng.keyed_generator(name, seed))
        _, boxes, keep = applied(policy, scenes, draws)
        assert len(boxes) == len(keep) == 3 * len(scenes)
        for j in range(len(boxes)):
            box = scenes[j // 3]["boxes"][j % 3]
            image, again, _ = applied(policy, painted(scenes, j // 3, rectangle(box)), draws)
            assert torch.equal(again, boxes)
            seen = image[0] > (0 if name == "MixUp" else 127)
            if keep[j]:
                assert (extent(seen) - boxes[j]).abs().max() <= slack
                kept += 1
            elif name != "MixUp":
                assert seen.sum() <= 0.1 * rectangle(box).sum() * 12 + 12  # scaled by 3.5 at most
    assert kept > 12


@pytest.mark.parametrize("name", MIXING)
def test_masks_and_boxes_agree(name):
    """A mask is where its painted object is seen, and with `tight` its box is its extent."""
    policy, kept = policy_of(name, tight=True, min_visibility=0.01), 0
    for seed in SEEDS:
        scenes = [scene(10 * seed + i) for i in range(1 + policy.partners)]
        draws = policy.sample(3 * len(scenes), rng.keyed_generator(name, seed))
        image, boxes, keep, masks = applied(policy, scenes, draws, "masks")
        loose = applied(policy_of(name, min_visibility=0.01), scenes, draws, "masks")[1]
        assert len(masks) == len(boxes)
        for j in range(len(boxes)):
            image = applied(policy, painted(scenes, j // 3, scenes[j // 3]["masks"][j % 3]), draws, "masks")[
                0
            ]
            seen = image[0] > (0 if name == "MixUp" else 127)
            if name in ("Mosaic", "ResizedCrop"):  # bilinear and nearest: a border of one pixel
                assert (seen ^ masks[j]).sum() <= 4 * (seen.sum() ** 0.5 + 2)
            elif name != "MixUp":
                assert torch.equal(seen, masks[j])
            if keep[j]:
                kept += 1
                start = scenes[j // 3]["boxes"][j % 3]
                assert torch.equal(boxes[j], start) or torch.equal(extent(masks[j]), boxes[j])
                assert (loose[j][:2] <= boxes[j][:2] + 0.51).all() and (
                    loose[j][2:] >= boxes[j][2:] - 0.51
                ).all()
    assert kept > 12


@pytest.mark.parametrize("name", [*MIXING, "FlipX_BBox", "FlipY_BBox", "Rotate_BBox", "TranslateX_BBox"])
def test_points_follow_the_painted_pixel(name):
    """A 3 x 3 block around a point stays around it; a point that says it is gone has no pixel left, and none
    that is gone is said to be there."""
    policy, there, gone = policy_of(name), 0, 0
    for seed in SEEDS:
        scenes = [scene(10 * seed + i) for i in range(1 + policy.partners)]
        draws = policy.sample(3 * len(scenes), rng.keyed_generator(name, seed))
        for j in range(3 * len(scenes)):
            x, y = scenes[j // 3]["points"][j % 3].int().tolist()
            block = rectangle(torch.tensor([x - 1, y - 1, x + 2, y + 2]))
            image, _, _, points = applied(policy, painted(scenes, j // 3, block), draws, "points")
            px, py, seen = points[j].tolist()
            found = (image[0] > 0).nonzero().double()
            if seen and name not in ("CutMix", "CopyPaste"):
                inner = 6 < px < W - 7 and 6 < py < H - 7
                assert len(found)
                distance = (found.flip(1).mean(0) - torch.tensor([px, py])).abs().max()
                assert distance <= (0.51 if inner and name != "Mosaic" else 4)
            elif seen:
                assert image[0, round(py), round(px)] == 255
            else:
                at = round(py), round(px)
                assert not (0 <= at[0] < H and 0 <= at[1] < W) or (name in MIXING and image[0][at] < 255)
            there, gone = there + bool(seen), gone + (not seen)
    assert there > 8 and (gone or "Flip" in name or name in ("MixUp", "Rotate_BBox", "TranslateX_BBox"))


def test_draws_replay_and_a_batch_is_its_images_one_by_one():
    """Draws go through JSON; with partners of other sizes, without, and with ops that visit boxes after."""
    names = [[name, 0.7, 8] for name in MIXING]
    chain = Chain([Policy([names[:2], names[2:]], fill=0), "detection_v1"], min_visibility=0.05)
    scenes = [scene(i) for i in range(6)]
    others = [[scene(100 + 10 * i + k, 36 + 5 * k, 70) for k in range(chain.partners)] for i in range(6)]
    draws = chain.sample_batch([3 * (1 + chain.partners)] * 6, rng.keyed_generator(5))
    assert any("boxes" in record for d in draws for record in d["ops"]), "no op visits boxes by themselves"
    draws = json.loads(json.dumps(draws))
    images, boxes, masks, points = ([s[k] for s in scenes] for k in ("image", "boxes", "masks", "points"))
    whole = chain.apply_batch(torch.stack(images), boxes, draws, masks, None, others, points)
    for i in range(6):
        one = chain.apply(images[i], boxes[i], draws[i], masks[i], None, others[i], points[i])
        assert all(torch.equal(a, b[i]) for a, b in zip(one, whole, strict=True))
        assert len(one[1]) == len(one[3]) == len(one[4]) == 3 * (1 + chain.partners)


def test_a_batch_is_its_own_partners():
    """Where nobody gives partners, the draws say which images of the batch they are."""
    policy, scenes = Policy([[["Mosaic", 1, 10], ["MixUp", 1, 10]]]), [scene(i) for i in range(4)]
    images, boxes = (
        torch.stack([s["image"] + 50 * i for i, s in enumerate(scenes)]),
        [s["boxes"] for s in scenes],
    )
    draws = policy.sample_batch([3] * 4, rng.keyed_generator(0))
    chosen = in_batch(draws)
    assert all(len(row) == policy.partners == 4 and i not in row for i, row in enumerate(chosen))
    others = [[{"image": images[j], "boxes": boxes[j]} for j in row] for row in chosen]
    together, given = (
        policy.apply_batch(images, boxes, draws),
        policy.apply_batch(images, boxes, draws, partners=others),
    )
    assert torch.equal(together[0], given[0])
    assert all(torch.equal(a, b) for k in (1, 2) for a, b in zip(together[k], given[k], strict=True))
    with pytest.raises(ConfigError, match="batch of two"):
        policy.apply(images[0], boxes[0], draws[0])
    with pytest.raises(ConfigError, match=r"policy\.partners"):
        policy.apply(images[0], boxes[0], draws[0], partner=others[0][:2])


def test_a_mosaic_is_its_tiles():
    """Scale 1/2 and a center in the middle show four whole images, each pixel the mean of four."""
    images = [torch.full((3, H, W), 40 * i, dtype=torch.uint8) for i in range(1, 5)]
    images[0][:, ::2, ::2] = 80  # 60 - 20 = 40: (80 + 3 * 40) / 4 = 50
    record = {"op": "Mosaic", "partners": [0.0] * 3, "at": [0.5, 0.5], "scale": 0.5, "windows": [[0, 0]] * 4}
    box = torch.tensor([[8.0, 4, 40, 28]])
    others = [{"image": x, "boxes": box} for x in images[1:]]
    out, boxes, keep = policy_of("Mosaic").apply(images[0], box, {"ops": [record]}, partner=others)
    tiles = out.unflatten(1, (2, H // 2)).unflatten(3, (2, W // 2))[0].transpose(1, 2)
    assert [tile.unique().tolist() for tile in tiles.flatten(0, 1)] == [[50], [80], [120], [160]]
    corner = torch.tensor([[0.0, 0], [W / 2, 0], [0, H / 2], [W / 2, H / 2]]).repeat(1, 2)
    assert torch.equal(boxes, corner + box / 2) and keep.all()


def test_mixup_weighs_boxes_by_their_images():
    """The picture is 1 - w of the image and w of its partner, and so are the boxes' weights; two after
    another multiply."""
    policy, (a, b, c) = (
        policy_of("MixUp"),
        (torch.full((3, H, W), v, dtype=torch.uint8) for v in (0, 100, 200)),
    )
    steps = [{"op": "MixUp", "partners": [0.0], "weight": w} for w in (0.25, 0.5)]
    boxes = torch.tensor([[8.0, 4, 40, 28]])
    others = [{"image": b, "boxes": boxes.repeat(2, 1)}, {"image": c, "boxes": boxes}]
    out, moved, keep = policy.apply(a, boxes, {"ops": steps}, partner=others)
    assert torch.equal(moved, boxes.repeat(4, 1)) and keep.all()
    assert torch.equal(box_weights({"ops": steps}, [1, 2, 1]), torch.tensor([0.375, 0.125, 0.125, 0.5]))
    assert (out.float() - (0.125 * 2 * 50 + 0.5 * 200)).abs().max() <= 1
    mosaic = {"op": "Mosaic", "partners": [0.0] * 3}
    assert box_weights({"ops": [mosaic, steps[0]]}, [1] * 6).tolist() == [0.75, 0.75, 0.75, 0.75, 0.25, 0]


def test_unused_partners_are_not_kept():
    policy = Policy([[["Mosaic", 0.0, 5], ["TranslateX_BBox", 1, 1]]])
    scenes = [scene(i) for i in range(4)]
    _, boxes, keep = applied(policy, scenes, policy.sample(12, rng.keyed_generator(0)))
    assert keep.tolist() == [True] * 3 + [False] * 9 and len(boxes) == 12
    _, boxes, keep = applied(policy, scenes, {"ops": []})
    assert torch.equal(boxes[keep], scenes[0]["boxes"]) and len(boxes) == 12


def test_chains_and_policies_that_do_not_fit_are_refused():
    assert Chain([policy_of("Mosaic"), RandAugment()]).partners == 3
    with pytest.raises(ConfigError, match="'Color'"):
        Chain([Policy([[["Color", 1, 5]]]), RandAugment()])
    with pytest.raises(ConfigError, match="has no Mosaic"):
        Policy([[["Mosaic", 1, 5]]], official=True)
    policy, (own, *others) = policy_of("Mosaic"), [scene(i) for i in range(4)]
    draws = policy.sample(12)
    with pytest.raises(ConfigError, match="has no boxes"):
        policy.apply(own["image"], own["boxes"], draws, partner=[{"image": x["image"]} for x in others])
    for image, said in ((own["image"].float(), "float32"), (own["image"][:1], "3 channels")):
        with pytest.raises(ConfigError, match=said):
            policy.apply(own["image"], own["boxes"], draws, partner=[{**x, "image": image} for x in others])
    with pytest.raises(ConfigError, match="tight=True"):
        policy = policy_of("ResizedCrop", tight=True)
        policy.apply(scene(0)["image"], scene(0)["boxes"], policy.sample(3, rng.keyed_generator(1)))
