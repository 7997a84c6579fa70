"""Minibatch optimal transport against brute force and the official pairs (goldens/fewstep/ot_*.json)."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.score.coupling import OptimalTransportLoss, assignment
from lit_gen.score.denoiser import GaussianMixtureDenoiser
from lit_gen.score.losses import DenoisingLoss, SlicedScoreLoss, UncertaintyLoss, UniformTime, flow
from lit_gen.score.sde import Flow

FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "fewstep"


def pairs():
    for path in sorted(FOLDER.glob("*.json")):
        golden = json.loads(path.read_text())
        if golden.get("kind") == "ot":
            arrays = np.load(path.with_name(f"{path.stem}.io.npz"))
            for name, case in golden["cases"].items():
                found = {k.removeprefix(f"{name}_"): arrays[k] for k in arrays if k.startswith(f"{name}_")}
                yield pytest.param(case, found, id=f"{path.stem}-{name}")


@pytest.mark.parity
@pytest.mark.parametrize(("case", "arrays"), list(pairs()))
def test_the_assignment_is_the_official_plan(case, arrays):
    x, y = (torch.from_numpy(arrays[k]) for k in ("x0", "x1"))
    if len(x) != len(y):
        pytest.skip("a batch has as many noises as images: another plan is no permutation")
    p = assignment(x, y)
    assert p.sort().values.tolist() == list(range(len(x)))
    cost = arrays["cost"]
    assert_close(
        torch.cdist(x.flatten(1), y.flatten(1)).square(), torch.from_numpy(cost), rtol=1e-9, atol=1e-9
    )
    assert cost[np.arange(len(x)), p].mean() == pytest.approx(case["plan_cost"], rel=1e-9)
    if case.get("assignment_equals_plan"):
        assert p.tolist() == arrays["assignment"].tolist()
        assert assignment(y, x).tolist() == p.argsort().tolist()
        plan = torch.zeros(cost.shape, dtype=torch.float64)
        plan[torch.arange(len(x)), p] = 1 / len(x)
        assert_close(plan, torch.from_numpy(arrays["plan"]), rtol=1e-9, atol=1e-12)


def test_no_permutation_is_cheaper():
    a, b = torch.randn(2, 6, 1, 2, 2, generator=keyed_generator("coupling"))
    cost = torch.cdist(a.flatten(1).double(), b.flatten(1).double()).square()
    totals = {p: cost[range(6), p].sum().item() for p in itertools.permutations(range(6))}
    p = tuple(assignment(a, b).tolist())
    assert p == min(totals, key=totals.__getitem__) != tuple(range(6))


def test_pairs_far_from_the_origin_are_told_apart_in_float32():
    """|a|^2 + |b|^2 - 2ab in float32 would not: the distances are 1e-3 of a norm of 1e4."""
    a = 1e4 + torch.randn(40, 1, 2, 2, generator=keyed_generator("far"))
    order = torch.randperm(40, generator=keyed_generator("order"))
    assert assignment(a, a[order]).tolist() == order.argsort().tolist()


@pytest.fixture
def classes():
    """Four classes, each a Gaussian of its own, whose denoiser needs the right label."""
    means = torch.randn(4, 1, 2, 2, generator=keyed_generator("means"))
    return GaussianMixtureDenoiser(Flow(), means, torch.tensor(0.1), torch.ones(4))


def inner():
    return DenoisingLoss(UniformTime(None), flow)


@pytest.mark.parametrize("loss", [inner(), UncertaintyLoss(inner())], ids=lambda loss: type(loss).__name__)
def test_the_noise_is_permuted_and_labels_stay_with_their_images(classes, loss):
    x_0 = torch.randn(8, 1, 2, 2, generator=keyed_generator("images"))
    label = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    coupled = OptimalTransportLoss(loss)
    t, z = coupled.draw(Flow(), x_0, keyed_generator("draw"))
    assert all(map(torch.equal, (t, z), loss.draw(Flow(), x_0, keyed_generator("draw"))))
    near = z[assignment(x_0, z)]
    assert (x_0 - near).square().sum() < (x_0 - z).square().sum()
    assert torch.equal(coupled(classes, x_0, t, z, label=label), loss(classes, x_0, t, near, label=label))
    assert set(dict(coupled.named_parameters())) == {
        f"loss.{name}" for name, _ in getattr(loss, "named_parameters", list)()
    }


def test_each_rank_couples_its_own_part(classes):
    x_0 = torch.randn(8, 1, 2, 2, generator=keyed_generator("images"))
    loss = OptimalTransportLoss(inner())
    t, z = loss.draw(Flow(), x_0, keyed_generator("draw"))
    halves = [loss(classes, *(rows[part] for rows in (x_0, t, z))) for part in (slice(4), slice(4, 8))]
    assert len(torch.cat(halves)) == 8 and not torch.equal(torch.cat(halves), loss(classes, x_0, t, z))


def test_other_losses_are_refused():
    with pytest.raises(ConfigError, match="SlicedScoreLoss"):
        OptimalTransportLoss(SlicedScoreLoss(UniformTime()))
