"""Policies: draws as data, replay, batches, the schema's messages."""

import json
import pickle

import pytest
import torch

from lit_gen import rng
from lit_gen.augment import AugMix, Policy, RandAugment, TrivialAugmentWide, shipped_policies
from lit_gen.augment.ops import happens
from lit_gen.augment.tables import CLASSIFICATION
from lit_gen.errors import ConfigError

ALL = [
    *shipped_policies(),
    RandAugment(),
    TrivialAugmentWide(),
    AugMix(),
    AugMix(depth=5, alpha=2.0, enhancing=True),
]


def images_of(n: int, h: int = 32, w: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=rng.keyed_generator("policy", n))


@pytest.mark.parametrize("policy", ALL, ids=lambda p: p if isinstance(p, str) else type(p).__name__)
def test_draws_are_plain_data_and_replay(policy):
    """JSON and pickle round trips; the same generator gives the same draws; a batch is its images one by
    one."""
    policy = Policy.load(policy) if isinstance(policy, str) else policy
    policy = pickle.loads(pickle.dumps(policy))
    images = images_of(40)
    with_boxes = not isinstance(policy, AugMix)
    boxes = [torch.tensor([[2.0, 3, 20, 25], [10, 10, 31, 30]])] * 40 if with_boxes else None
    counts = [2] * 40 if with_boxes else 40
    draws = policy.sample_batch(counts, rng.keyed_generator(5))
    assert (
        draws
        == policy.sample_batch(counts, rng.keyed_generator(5))
        != policy.sample_batch(counts, rng.keyed_generator(6))
    )
    draws = json.loads(json.dumps(draws))
    before = images.clone()
    out, moved, keeps = policy.apply_batch(images, boxes, draws)
    assert torch.equal(images, before) and not torch.equal(out, images)
    for i in range(40):
        one, box, keep = policy.apply(images[i], boxes[i] if with_boxes else None, draws[i])
        assert torch.equal(one, out[i])
        if with_boxes:
            assert torch.equal(box, moved[i]) and torch.equal(keep, keeps[i])


def test_selection_and_coins_have_their_probabilities():
    """3,000 draws: sub-policies uniform, ops at their p, signs at 1/2, `_Only_BBoxes` at p/3 a box; five
    sigma."""
    subs = [
        [["Rotate_BBox", 0.3, 5]],
        [["Equalize_Only_BBoxes", 0.9, 5]],
        [["Color", 0.0, 5]],
        [["Color", 1.0, 5]],
    ]
    policy, g, n = Policy(subs), rng.keyed_generator(0), 3000
    draws = [policy.sample(4, g) for _ in range(n)]
    near = lambda count, total, p: abs(count / total - p) < 5 * (p * (1 - p) / total) ** 0.5 + 1e-9  # noqa: E731
    by_sub = [[d["ops"] for d in draws if d["sub_policy"] == k] for k in range(4)]
    assert all(near(len(ops), n, 0.25) for ops in by_sub)
    rotations = [ops[0]["magnitude"] for ops in by_sub[0] if ops]
    assert near(len(rotations), len(by_sub[0]), 0.3) and set(rotations) == {15.0, -15.0}
    assert near(sum(m > 0 for m in rotations), len(rotations), 0.5)
    visited = sum(len(ops[0]["boxes"]) for ops in by_sub[1] if ops)
    assert near(visited, 4 * len(by_sub[1]), 0.3)
    assert not any(by_sub[2]) and all(by_sub[3])


def test_coin_is_the_official_float32_sum():
    assert happens(0.0, 1.0) and not happens(1 - 2**-24, 0.0)
    assert happens(0.4, 0.6) and not happens(0.39999, 0.6)


def test_an_image_without_boxes_tosses_the_same_coins():
    """BBox_Cutout's coin is taken although nothing can be cut out; 1/2 - 2^-25 rounds to a sign of +."""
    policy = Policy([[["BBox_Cutout", 1.0, 4], ["ShearX_BBox", 1.0, 5]]])
    numbers = [0.9, 0.0, 0.5 - 2**-25]
    (shear,) = policy.draw_ops(policy.sub_policies[0], 0, iter(numbers))
    assert shear == {"op": "ShearX_BBox", "magnitude": 0.15}
    with_box = policy.draw_ops(policy.sub_policies[0], 1, iter([0.9, 0.1, 0.2, 0.3, 0.0, 0.4]))
    assert [r["op"] for r in with_box] == ["BBox_Cutout", "ShearX_BBox"]
    assert with_box[1]["magnitude"] == -0.15


def test_sample_pairing_mixes_another_image_of_the_batch():
    policy = Policy([[["SamplePairing", 1.0, 9]]], "classification")
    images = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    draws = [{"ops": [{"op": "SamplePairing", "magnitude": 0.4, "partner": u}]} for u in (0.0, 0.6, 0.0)]
    out, _, _ = policy.apply_batch(images, None, draws)
    assert out[:, 0, 0, 0].tolist() == [40, 60, 120]  # partners 1, 0, 0
    with pytest.raises(ConfigError, match="batch of two"):
        policy.apply(images[0], None, draws[0])


def test_yaml_and_json_round_trip(tmp_path):
    policy = Policy.load("detection_v2")
    (tmp_path / "p.yaml").write_text(policy.to_yaml("found by a search\nreward 0.9"))
    (tmp_path / "p.json").write_text(json.dumps({"ops": "detection", "sub_policies": policy.sub_policies}))
    assert (tmp_path / "p.yaml").read_text().startswith("# found by a search\n# reward 0.9\nops: detection\n")
    for name in ("p.yaml", "p.json"):
        assert Policy.load(tmp_path / name).sub_policies == policy.sub_policies


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "{ops: detection, sub_policies: [[[Color, .5, 5]], [[Color, 1, 5], [Rotat, 1, 5]]]}",
            "sub-policy 1, op 1: 'Rotat'",
        ),
        (
            "{ops: detection, sub_policies: [[[Color, 1.5, 5]]]}",
            r"sub-policy 0, op 0 \(Color\): probability 1.5",
        ),
        ("{ops: detection, sub_policies: [[[Color, 1, 11]]]}", r"op 0 \(Color\): level 11 .* \[0, 10\]"),
        ("{ops: classification, sub_policies: [[[Color, 1, 10]]]}", r"level 10 .* \[0, 9\]"),
        ("{ops: detection, sub_policies: [[[Color, 1, null]]]}", "level None"),
        ("{ops: detection, sub_policies: [[[Color, yes, 1]]]}", "probability True"),
        ("{ops: detection, sub_policies: [[[Color, 1]]]}", "probability, level"),
        ("{ops: detection, sub_policies: [[]]}", "sub-policy 0"),
        ("{ops: detection, sub_policies: []}", "at least one"),
        ("{ops: cooking, sub_policies: [[[Color, 1, 1]]]}", "cooking"),
        ("{sub_policies: [[[Color, 1, 1]]]}", "keys ops"),
        ("{ops: detection, sub_policies: [[[Color, 1, 1]]], colour: 3}", "keys ops"),
        ("[", "not readable"),
    ],
)
def test_bad_policy_files_are_named(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        Policy.load(path)
    assert "mine.yaml" in str(error.value)


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="detection_v0"):
        Policy.load("detection_v9")
    with pytest.raises(ConfigError, match="fill"):
        Policy.load("detection_v0", fill=300)
    with pytest.raises(ConfigError, match="min_visibility"):
        Policy.load("detection_v0", min_visibility=2)
    with pytest.raises(ConfigError, match="box_format"):
        Policy.load("detection_v0", box_format="yolo")
    with pytest.raises(ConfigError, match="official"):
        Policy.load("classification_svhn", official=True)
    policy = Policy.load("detection_v0")
    with pytest.raises(ConfigError, match="float32"):
        policy.apply(torch.zeros(3, 8, 8), None, {"ops": []})
    with pytest.raises(ConfigError, match=r"\(N, 4\)"):
        policy.apply(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(4), {"ops": []})
    with pytest.raises(ConfigError, match="Invert"):
        policy.apply(torch.zeros(3, 8, 8, dtype=torch.uint8), None, {"ops": [{"op": "Invert"}]})
    with pytest.raises(ConfigError, match="magnitude"):
        RandAugment(magnitude=31)
    with pytest.raises(ConfigError, match="severity"):
        AugMix(severity=11)
    with pytest.raises(ConfigError, match="num_bins"):
        TrivialAugmentWide(num_bins=1)


def test_classification_ranges_are_torchvisions():
    """Magnitude of every op and level against torchvision's table for 224 pixels; Solarize alone differs, by
    its start of 256."""
    from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

    space = AutoAugment(AutoAugmentPolicy.IMAGENET)._AUGMENTATION_SPACE
    for name, (magnitudes, signed) in space.items():
        table, op = magnitudes(10, 224, 224), CLASSIFICATION[name]
        assert op.signed == signed, name
        if table is None:
            assert op.magnitude is None
            continue
        ours = torch.tensor([float(op.magnitude(level)) for level in range(10)])
        if name.startswith("Translate"):
            ours = ours * 224
        if name == "Solarize":
            assert (ours - 256 * table).abs().max() <= 1 and ours[0] == 256
        else:
            torch.testing.assert_close(ours, table.float(), rtol=1e-5, atol=1e-4)


def test_a_policy_file_keeps_fill_and_visibility(tmp_path):
    """What the search writes is what it searched; options of the caller go first."""
    policy = Policy([[["Rotate", 0.5, 3]]], "classification", fill=0, min_visibility=0.3)
    (tmp_path / "p.yaml").write_text(policy.to_yaml("found"))
    again = Policy.load(tmp_path / "p.yaml")
    assert (again.fill, again.min_visibility, again.sub_policies) == (0, 0.3, policy.sub_policies)
    assert Policy.load(tmp_path / "p.yaml", fill=7).fill == 7
    with pytest.raises(ConfigError, match="fill = 300"):
        (tmp_path / "p.yaml").write_text("{ops: detection, sub_policies: [[[Color, 1, 1]]], fill: 300}")
        Policy.load(tmp_path / "p.yaml")
