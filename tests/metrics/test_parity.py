"""Against the recorded numbers of torch-fidelity, torchmetrics, scipy, prdc and 50-digit arithmetic
(goldens/metrics): any folder of its form, whatever its sizes and cases.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_gen.metrics import Extractor, ExtractorId, FeatureStatistics, neighbours
from lit_gen.metrics.functional import (
    Moments,
    frechet_distance,
    frechet_infinity,
    inception_score,
    moments,
    moments_of_sums,
)
from lit_gen.metrics.kernels import (
    Kernel,
    cmmd,
    kernel_distance,
    polynomial_kernel,
    rbf_kernel,
)
from lit_gen.metrics.neighbours import authenticity, precision_recall_density_coverage

pytestmark = pytest.mark.parity

FLOAT32 = 2.0**-23


def kernel_distance_subsets(
    reference: torch.Tensor,
    generated: torch.Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    kernel: Kernel = polynomial_kernel,
) -> tuple[float, float]:
    """Mean and standard deviation of `kernel_distance` over random subsets, drawn as torch-fidelity draws
    them.
    """
    random, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        fake = generated[torch.from_numpy(random.choice(len(generated), subset_size, replace=False))]
        real = reference[torch.from_numpy(random.choice(len(reference), subset_size, replace=False))]
        values.append(kernel_distance(real, fake, kernel).value)
    return float(np.mean(values)), float(np.std(values))


def inception_score_splits(
    logits: torch.Tensor, splits: int = 10, seed: int | None = 2020
) -> tuple[float, float]:
    """Mean and standard deviation of the score of `splits` parts, shuffled as torch-fidelity does with
    `seed`; None keeps the order.
    """
    n = len(logits)
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(n))]
    scores = [inception_score(logits[i * n // splits : (i + 1) * n // splits]).value for i in range(splits)]
    return float(np.mean(scores)), float(np.std(scores))


FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "metrics"
if not (FOLDER / "expected_features.json").exists():
    pytest.skip(f"{FOLDER} holds no goldens: others are being replayed", allow_module_level=True)
RECORDED = json.loads((FOLDER / "expected_features.json").read_text())
CASES = sorted(name for name, entry in RECORDED.items() if isinstance(entry, dict) and "n_real" in entry)
NEIGHBOURS = sorted(
    (case, int(found[1]))
    for case in CASES
    for key in RECORDED[case]
    if (found := re.fullmatch(r"prdc_k(\d+)_float64", key))
)


def load(name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(FOLDER / f"{name}.npy"))


def read(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and generated features of a case: its sizes are recorded, its kind is in its name."""
    named = re.match(r"A\d*_vs_(A|B|const)", case)
    assert named, f"{case}: a real set A, then A, B or const"
    n, m = RECORDED[case]["n_real"], RECORDED[case]["n_fake"]
    real = load("features_A")
    if named[1] == "const":
        return real[:n], real[:1].expand(m, -1)
    return real[:n], load(f"features_{named[1]}")[:m]


def test_there_are_cases():
    assert CASES and NEIGHBOURS


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance(case):
    real, fake = read(case)
    a, b, fid = moments(real), moments(fake), RECORDED[case]["fid"]
    scale = max(1.0, float(a.cov.trace() + b.cov.trace()))
    exact = float(fid.get("mpmath_50_digits", fid["nuclear_norm_float64"]))
    assert frechet_distance(a, b) == pytest.approx(exact, abs=1e-11 * scale)
    singular = min(a.n, b.n) <= a.d  # where the roots of rounding errors are their errors
    theirs = {"scipy_sqrtm_float64": (2e-6 if singular else 1e-9) * scale}
    # torch-fidelity's means are sums in float32, which drift by some last digits.
    drift = 2 * float((a.mean - b.mean).norm()) * float(a.mean.norm() + b.mean.norm()) * 16 * FLOAT32
    theirs["torch_fidelity"] = drift + (2e-6 if singular else 5e-7) * scale
    for name, tolerance in theirs.items():
        if name in fid:
            assert frechet_distance(a, b) == pytest.approx(fid[name], abs=tolerance), name


@pytest.mark.parametrize("case", CASES)
def test_kernel_distances(case):
    real, fake = read(case)
    kid = RECORDED[case]["kid"]
    drawn = kid["subsets"], kid["subset_size"], kid["rng_seed"]
    # Theirs are float32: an error of some last digits of the kernel's values.
    x, y = real.double(), fake.double()
    means = [float(polynomial_kernel(a, b).abs().mean()) for a, b in ((x, x), (y, y), (x, y))]
    tolerance = 2e-6 * max(1.0, *means)
    for name, kernel, allowed in (
        ("torch_fidelity_features1_fake_features2_real", polynomial_kernel, tolerance),
        ("torch_fidelity_rbf_sigma10", rbf_kernel, 2e-6),
    ):
        if name in kid and (kernel is polynomial_kernel or kid["subset_size"] <= 200):  # else a minute
            mean, sd = kernel_distance_subsets(real, fake, *drawn, kernel)
            assert mean == pytest.approx(kid[name]["kernel_inception_distance_mean"], abs=allowed)
            assert sd == pytest.approx(kid[name]["kernel_inception_distance_std"], abs=allowed)
    if "full_set_poly_unbiased_float64" in kid:
        expected = kid["full_set_poly_unbiased_float64"]
        assert kernel_distance(real, fake).value == pytest.approx(expected, abs=1e-6 * tolerance)
    if "cmmd_formula_biased_sigma10_x1000_float64" in kid:
        expected = kid["cmmd_formula_biased_sigma10_x1000_float64"]
        assert cmmd(real, fake).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("case", "k"), NEIGHBOURS)
def test_prdc(case, k, monkeypatch):
    real, fake = read(case)
    got = precision_recall_density_coverage(real, fake, k)
    # Where a point lies on the edge of a ball (identical, const), rounding decides in theirs: ours has it
    # outside, so theirs is between ours and ours with the edge inside; elsewhere these two are the same.
    monkeypatch.setattr(neighbours, "INSIDE", 2 - neighbours.INSIDE)
    with_edge = precision_recall_density_coverage(real, fake, k)
    for name, theirs in RECORDED[case][f"prdc_k{k}_float64"].items():
        low, high = got[name].value, with_edge[name].value
        assert low - 1e-12 <= theirs <= high + 1e-12, name
        if "_vs_B" in case:
            assert low == high, name


def test_prdc_far_from_zero():
    sets = np.load(FOLDER / "prdc_trap_offset.npz")
    real, fake = torch.from_numpy(sets["real"]), torch.from_numpy(sets["fake"])
    for k, expected in json.loads((FOLDER / "expected_prdc_trap.json").read_text()).items():
        got = precision_recall_density_coverage(real, fake, int(k.removeprefix("k")))
        expected = expected["prdc_float64"]
        assert {name: value for name, (value, _) in got.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_authenticity(case):
    assert authenticity(*read(case)).value == pytest.approx(RECORDED[case]["authpct_float64"], abs=1e-9)


def test_inception_score():
    logits, checked = load("logits_A"), 0
    for name, expected in RECORDED["inception_score_logits_A"].items():
        parts = re.fullmatch(r"torch_fidelity_splits(\d+)(?:_(?:no_shuffle|shuffle_seed(\d+)))?", name)
        if parts is None:
            continue  # torchmetrics shuffles by torch's generator
        seed = None if parts[2] is None else int(parts[2])
        mean, sd = inception_score_splits(logits, int(parts[1]), seed)
        assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12), name
        assert sd == pytest.approx(expected["inception_score_std"], abs=1e-12), name
        if parts[1] == "1":
            assert inception_score(logits).value == pytest.approx(expected["inception_score_mean"], rel=1e-12)
        checked += 1
    assert checked


def test_distances_of_prefixes():
    curve = RECORDED["fid_infinity_prefixes_of_B"]
    reference, fake = moments(load("features_A")), load("features_B")
    distances = [frechet_distance(reference, moments(fake[:n])) for n in curve["N"]]
    assert distances == pytest.approx(curve["fid"], abs=1e-9)
    m, d, points = len(fake), fake.shape[1], len(curve["N"])
    if m >= 4 * d and np.allclose(curve["N"], np.linspace(max(m / points, 2 * d), m, points).round()):
        assert frechet_infinity(reference, fake, points).value == pytest.approx(curve["intercept"], abs=1e-9)


def test_moments_of_unequal_shards():
    real, fake = load("features_A"), load("features_B").double()
    cuts = np.cumsum([1, 2, 3, 5, 8, 13])  # and the rest
    shards = fake.tensor_split(torch.from_numpy(cuts))
    n, total = sum(map(len, shards)), sum(shard.sum(0) for shard in shards)
    merged = moments_of_sums(n, total, sum(shard.T @ shard for shard in shards))
    expected = RECORDED["sharded_moments"]["fid"]
    assert frechet_distance(moments(real), merged) == pytest.approx(expected, abs=1e-10)


def test_moments_in_foreign_files():
    path = FOLDER / "stats_A_mu_sigma.npz"
    if not path.exists():
        pytest.skip("not among the compact goldens")
    stored, real = np.load(path), load("features_A")
    other = Moments(len(real), torch.from_numpy(stored["mu"]), torch.from_numpy(stored["sigma"]))
    scale = max(1.0, float(other.cov.trace()))
    assert frechet_distance(moments(real), other) == pytest.approx(0, abs=1e-10 * scale)


class Tiny(nn.Module):
    """The extractor of tiny_extractor.npz: (x - 128) / 128, twice conv 3x3 of stride 2 and relu, mean; a
    linear head.
    """

    def __init__(self, weights):
        super().__init__()
        self.weights = {name: torch.from_numpy(weights[name]) for name in weights.files}

    def forward(self, x):
        w, x = self.weights, (x - 128) / 128
        for i in "12":
            x = F.relu(F.conv2d(x, w[f"w{i}"], w[f"b{i}"], stride=2, padding=1))
        features = x.mean((2, 3))
        return features, features @ w["wfc"].T


def test_from_images_to_numbers():
    if not (FOLDER / "tiny_extractor.npz").exists():
        pytest.skip("not among the compact goldens")
    weights = np.load(FOLDER / "tiny_extractor.npz")
    identity = ExtractorId("tiny", "1", "0" * 64, "none", "mean", weights["wfc"].shape[1])
    extractor = Extractor(identity, Tiny(weights), channels=weights["w1"].shape[1])
    sets, recorded = np.load(FOLDER / "images_A_B.npz"), np.load(FOLDER / "tiny_features.npz")
    images = {name: torch.from_numpy(sets[name]) for name in "AB"}
    features = {name: extractor(x) for name, x in images.items()}
    for name, got in features.items():
        torch.testing.assert_close(got, torch.from_numpy(recorded[name]), rtol=1e-5, atol=1e-6)
    statistics = FeatureStatistics(extractor.id.d)
    for batch in images["B"].split(64):
        statistics.update(extractor(batch))
    distance = frechet_distance(moments(features["A"]), statistics.compute())
    expected = json.loads((FOLDER / "expected_images.json").read_text())["tiny"]
    theirs = expected["torch_fidelity"]
    assert distance == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6)
    size = expected.get("kid_subset_size", 100)
    mean, sd = kernel_distance_subsets(features["A"], features["B"], 100, size)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=2e-6)
    assert sd == pytest.approx(theirs["kernel_inception_distance_std"], abs=2e-6)
    score = inception_score_splits(extractor.with_logits(images["B"])[1])
    assert score == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), abs=1e-5)
    prc = precision_recall_density_coverage(features["A"], features["B"], 3)
    assert prc["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)
    assert prc["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)
