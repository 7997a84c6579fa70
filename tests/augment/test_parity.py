"""Bit for bit against the official TensorFlow code: every case of cases/index.json, with its recorded draws.

The recorded numbers are fed to `Policy.sample`'s own drawing code as its uniform numbers, so coins, signs,
orders and places are tested too, not only the pixels. Nothing may differ: the tolerances of the goldens'
README are not needed.
"""

import json
import math
import os
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gen.augment import Policy, pixels
from lit_gen.augment.tables import DETECTION_OFFICIAL

pytestmark = pytest.mark.parity
COMMITTED = Path(__file__).parents[1] / "goldens" / "autoaugment"
GIVEN = os.environ.get("LITGEN_GOLDENS")
FOLDER = Path(GIVEN) / "autoaugment" if GIVEN else COMMITTED
INDEX = FOLDER / "cases" / "index.json"
CASES = json.loads(INDEX.read_text())["cases"] if INDEX.is_file() else []


def test_there_are_cases():
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} does not exist: other goldens are being replayed")
    assert CASES and len({c["id"] for c in CASES}) == len(CASES)


def located(name: str) -> Path:
    """A set of cases may share the inputs and policies of the committed one."""
    return FOLDER / name if (FOLDER / name).is_file() else COMMITTED / name


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(located(name)) as file:
        return dict(file)


def uniform_numbers(case: dict) -> list[float]:
    """The recorded draws, as uniform numbers in the order in which our ops draw: coin, sign, place; or sign,
    order, coins, places.
    """
    numbers = []
    for k, (name, probability, _) in enumerate(listed(case)):
        sites = defaultdict(list)
        for d in case["draws"]:
            if d["op"] == k:
                sites[d["site"]].append(d)
        only = name.endswith("_Only_BBoxes")
        if not only:
            coin = [d["value"] for d in sites["_apply_func_with_prob"]] or [0.0]
            numbers += coin
            if math.floor(np.float32(coin[0]) + np.float32(probability)) < 1:
                continue
        numbers += [d["value"] for d in sites["_randomly_negate_tensor"]]
        for d in sites["_apply_multi_bbox_augmentation"]:
            keys = np.empty(len(d["value"]))
            keys[d["value"]] = np.arange(len(d["value"])) / max(1, len(d["value"]))
            numbers += keys.tolist()
        numbers += [d["value"] for d in sites["_apply_bbox_augmentation_wrapper"]]
        numbers += [place(d) for d in sites["apply_bbox_cutout"] + sites["_cutout_inside_bbox"]]
        cutout = sorted(
            sites["cutout"], key=lambda d: d["site_id"]
        )  # rows first, then columns; one pair a box
        half = len(cutout) // 2
        numbers += [place(d) for pair in zip(cutout[:half], cutout[half:], strict=True) for d in pair]
    return numbers


def place(draw: dict) -> float:
    """A fraction u with low + floor(u (high - low)) = value."""
    return (draw["value"] - draw["low"] + 0.5) / max(1, draw["high"] - draw["low"])


def listed(case: dict) -> list[list]:
    """The ops of a case. A single op was applied without its outer coin: only boxes' own coins know its
    probability."""
    if "ops" in case:
        return case["ops"]
    own = case["op"].endswith("_Only_BBoxes")
    return [[case["op"], case.get("prob", 1.0) if own else 1.0, case["level"]]]


def run(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    policy = Policy([listed(case)], "detection", official=True, box_format="yxyx_normalized")
    inputs = arrays("inputs.npz")
    image = torch.from_numpy(inputs[case["input"] + "/image"]).permute(2, 0, 1).contiguous()
    boxes = torch.from_numpy(inputs[case["input"] + "/boxes"])
    draws = {
        "sub_policy": 0,
        "ops": policy.draw_ops(policy.sub_policies[0], len(boxes), iter(uniform_numbers(case))),
    }
    draws = json.loads(json.dumps(draws))
    before = image.clone()
    out, out_boxes, keep = policy.apply(image, boxes, draws)
    assert torch.equal(image, before) and keep.all()
    return out.permute(1, 2, 0), out_boxes


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.get("source") == "tensorflow/tpu"], ids=lambda c: c["id"]
)
def test_official_case(case):
    image, boxes = run(case)
    expected = arrays(f"cases/{case['file']}")
    np.testing.assert_array_equal(image, expected[case["id"] + "/image"])
    np.testing.assert_array_equal(boxes, expected[case["id"] + "/boxes"])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.get("source") != "tensorflow/tpu"], ids=lambda c: c["id"]
)
def test_repaired_contrast_case(case):
    """google/automl's Contrast has the mean right; so has ours outside the official mode."""
    assert case["op"] == "Contrast"
    image = torch.from_numpy(arrays("inputs.npz")[case["input"] + "/image"]).permute(2, 0, 1)[None]
    out = pixels.contrast(image, [DETECTION_OFFICIAL["Contrast"].magnitude(case["level"])])[0]
    expected = arrays(f"cases/{case['file']}")[case["id"] + "/image"]
    np.testing.assert_array_equal(out.permute(1, 2, 0), expected)


def test_shipped_policies_are_the_official_data():
    data = json.loads(located("policies.json").read_text())
    shipped = {f"detection_{k}": v for k, v in data["detection"].items() if k != "test"}
    shipped |= {f"classification_{k}": data["classification"][k] for k in ("imagenet", "cifar10", "svhn")}
    for name, expected in shipped.items():
        policy = Policy.load(name)
        assert [[list(op) for op in sub] for sub in policy.sub_policies] == expected, name
    assert {op["name"] for op in data["ops"]} == set(DETECTION_OFFICIAL)
    assert {op["name"] for op in data["ops"] if op["random_sign"]} == {
        k for k, op in DETECTION_OFFICIAL.items() if op.signed
    }
