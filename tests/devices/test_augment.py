"""Augmentation of images on a GPU: every op of every table, with boxes and masks beside, and the shipped
policies. They are meant for workers, so that the host may wait; no op may mix devices."""

import numpy as np
import pytest
import torch

from lit_gen.augment import Policy
from lit_gen.augment.families import AugMix, RandAugment, TrivialAugmentWide
from lit_gen.augment.policy import shipped_policies
from lit_gen.augment.tables import CLASSIFICATION, DETECTION, DETECTION_OFFICIAL, MIXING
from lit_gen.rng import keyed_generator

B, H, W = 4, 16, 20
TABLES = {
    "classification": CLASSIFICATION,
    "detection": DETECTION,
    "official": DETECTION_OFFICIAL,
    "mixing": MIXING,
}
OPS = [(table, name) for table, ops in TABLES.items() for name in ops]


def policy_of(table: str, name: str) -> Policy:
    policy = [[(name, 1.0, 7)]]
    ops = "classification" if table == "classification" else "detection"
    return Policy(policy, ops=ops, official=table == "official")


def images() -> torch.Tensor:
    return torch.randint(256, (B, 3, H, W), generator=keyed_generator("images"), dtype=torch.uint8)


def draws(policy, num_boxes: int) -> list:
    return [policy.sample(num_boxes, keyed_generator("draws", i)) for i in range(B)]


@pytest.mark.parametrize(("table", "name"), OPS)
def test_ops(cuda, table, name):
    policy, host = policy_of(table, name), images()
    partners = host.flip(0) if name == "SamplePairing" else None  # the others take them from the batch
    expected = policy.apply_batch(host, None, draws(policy, 0), partners=partners)[0]
    on_device = policy.apply_batch(cuda.put(host), None, draws(policy, 0), partners=cuda.put(partners))[0]
    assert on_device.device == cuda.device and on_device.dtype == torch.uint8
    assert not cuda.real or torch.equal(on_device.cpu(), expected)


@pytest.mark.parametrize("table", ["detection", "official", "mixing"])
def test_boxes_and_masks(cuda, table):
    boxes = [torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.3, 0.3, 0.9, 0.8]]) for _ in range(B)]
    masks = [torch.from_numpy(np.eye(H, W, dtype=np.uint8))[None].repeat(2, 1, 1) for _ in range(B)]
    for name in TABLES[table]:
        policy, host = policy_of(table, name), images()
        expected = policy.apply_batch(host, boxes, draws(policy, 2), masks)
        found = policy.apply_batch(cuda.put(host), cuda.put(boxes), draws(policy, 2), cuda.put(masks))
        for given, wanted in zip(
            torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True
        ):
            assert given.device == cuda.device and given.dtype == wanted.dtype
            assert not cuda.real or torch.equal(given.cpu(), wanted)


FAMILIES = {
    **{name: lambda name=name: Policy.load(name) for name in shipped_policies()},
    "RandAugment": RandAugment,
    "TrivialAugment": TrivialAugmentWide,
    "AugMix": AugMix,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_policies(cuda, name):
    policy, host = FAMILIES[name](), images()
    expected = policy.apply_batch(host, None, draws(policy, 0))[0]
    found = policy.apply_batch(cuda.put(host), None, draws(policy, 0))[0]
    assert found.device == cuda.device and found.dtype == torch.uint8
    assert not cuda.real or torch.equal(found.cpu(), expected)
