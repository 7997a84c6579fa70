"""Against the recorded numbers of torch-fidelity, torchmetrics, scipy, prdc and 50-digit arithmetic
(goldens/metrics).
"""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_gen.metrics import Extractor, ExtractorId, FrechetDistance
from lit_gen.metrics.functional import (
    Moments,
    frechet_distance,
    frechet_distance_of_features,
    inception_score,
    inception_score_splits,
    moments,
)
from lit_gen.metrics.kernels import cmmd, kernel_distance, kernel_distance_subsets, rbf_kernel
from lit_gen.metrics.neighbours import authenticity, precision_recall_density_coverage

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(goldens):
    return goldens / "metrics"


@pytest.fixture(scope="module")
def features(folder):
    return {name: torch.from_numpy(np.load(folder / f"features_{name}.npy")) for name in "AB"}


@pytest.fixture(scope="module")
def recorded(folder):
    return json.loads((folder / "expected_features.json").read_text())


def read(case: str, recorded: dict, features: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and generated features of a case: its sizes are recorded, its kind is in its name."""
    n, m = recorded[case]["n_real"], recorded[case]["n_fake"]
    real = features["A"][:n]
    if "const" in case:
        return real, features["A"][:1].expand(m, -1)
    return real, features["A" if "identical" in case else "B"][:m]


CASES = [
    "A_vs_B",
    "A_vs_A_identical",
    "A40_vs_B48_singular_n_below_d",
    "A40_vs_A40_identical_singular",
    "A_vs_const_zero_covariance",
]


def cases(recorded):
    return [case for case, entry in recorded.items() if isinstance(entry, dict) and "n_real" in entry]


def test_every_recorded_case_is_tested(recorded):
    assert sorted(cases(recorded)) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance(case, recorded, features):
    real, fake = read(case, recorded, features)
    fid = recorded[case]["fid"]
    exact = float(fid.get("mpmath_50_digits", fid["nuclear_norm_float64"]))
    assert frechet_distance_of_features(real, fake) == pytest.approx(exact, abs=1e-12)
    assert frechet_distance(moments(real), moments(fake)) == pytest.approx(exact, abs=1e-11)
    for name, theirs in (
        ("scipy_sqrtm_float64", 2e-7),
        ("torch_fidelity", 6e-6 if "const" in case else 5e-7),
    ):
        assert frechet_distance(moments(real), moments(fake)) == pytest.approx(fid[name], abs=theirs)


@pytest.mark.parametrize("case", CASES)
def test_kernel_distances(case, recorded, features):
    real, fake = read(case, recorded, features)
    kid = recorded[case]["kid"]
    size, theirs = kid["subset_size"], kid["torch_fidelity_features1_fake_features2_real"]
    mean, sd = kernel_distance_subsets(real, fake, kid["subsets"], size, kid["rng_seed"])
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=2e-6)
    assert sd == pytest.approx(theirs["kernel_inception_distance_std"], abs=2e-6)
    if size < 100:
        theirs = kid["torch_fidelity_rbf_sigma10"]
        mean, sd = kernel_distance_subsets(real, fake, kid["subsets"], size, kid["rng_seed"], rbf_kernel)
        assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=2e-6)
    if "full_set_poly_unbiased_float64" in kid:
        expected = kid["full_set_poly_unbiased_float64"]
        assert kernel_distance(real, fake).value == pytest.approx(expected, abs=1e-12)
    if "cmmd_formula_biased_sigma10_x1000_float64" in kid:
        expected = kid["cmmd_formula_biased_sigma10_x1000_float64"]
        assert cmmd(real, fake).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [3, 5])
def test_prdc(case, k, recorded, features):
    got = precision_recall_density_coverage(*read(case, recorded, features), k)
    for name, (value, _) in got.items():
        # Where distances tie (const), their float32 and float64 differ; exact arithmetic agrees with one of
        # them.
        theirs = [recorded[case][f"prdc_k{k}_{dtype}"][name] for dtype in ("float32", "float64")]
        assert any(value == pytest.approx(x, abs=1e-12) for x in theirs), name


@pytest.mark.parametrize("k", [3, 5])
def test_prdc_far_from_zero(k, folder):
    sets = np.load(folder / "prdc_trap_offset.npz")
    expected = json.loads((folder / "expected_prdc_trap.json").read_text())[f"k{k}"]["prdc_float64"]
    real, fake = torch.from_numpy(sets["real"]), torch.from_numpy(sets["fake"])
    got = precision_recall_density_coverage(real, fake, k)
    assert {name: value for name, (value, _) in got.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_authenticity(case, recorded, features):
    value = authenticity(*read(case, recorded, features)).value
    assert value == pytest.approx(recorded[case]["authpct_float64"], abs=1e-9)


def test_inception_score(recorded, folder):
    logits = torch.from_numpy(np.load(folder / "logits_A.npy"))
    expected = recorded["inception_score_logits_A"]
    one = expected["torch_fidelity_splits1"]["inception_score_mean"]
    assert inception_score(logits).value == pytest.approx(one, abs=1e-12)
    for name, seed in (("shuffle_seed2020", 2020), ("no_shuffle", None)):
        theirs = expected[f"torch_fidelity_splits10_{name}"]
        mean, sd = inception_score_splits(logits, 10, seed)
        assert mean == pytest.approx(theirs["inception_score_mean"], abs=1e-12)
        assert sd == pytest.approx(theirs["inception_score_std"], abs=1e-12)


def test_distances_of_prefixes(recorded, features):
    curve = recorded["fid_infinity_prefixes_of_B"]
    reference = moments(features["A"])
    distances = [frechet_distance(reference, moments(features["B"][:n])) for n in curve["N"]]
    assert distances == pytest.approx(curve["fid"], abs=1e-10)


def test_moments_in_foreign_files(folder, features):
    path = folder / "stats_A_mu_sigma.npz"
    if not path.exists():
        pytest.skip("not among the compact goldens")
    stored = np.load(path)
    other = Moments(len(features["A"]), torch.from_numpy(stored["mu"]), torch.from_numpy(stored["sigma"]))
    assert frechet_distance(moments(features["A"]), other) == pytest.approx(0, abs=1e-10)


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


def test_from_images_to_numbers(folder):
    if not (folder / "tiny_extractor.npz").exists():
        pytest.skip("not among the compact goldens")
    identity = ExtractorId("tiny", "1", "0" * 64, "none", "mean", 64)
    extractor = Extractor(identity, Tiny(np.load(folder / "tiny_extractor.npz")), channels=3)
    sets, recorded = np.load(folder / "images_A_B.npz"), np.load(folder / "tiny_features.npz")
    images = {name: torch.from_numpy(sets[name]) for name in "AB"}
    features = {name: extractor(x) for name, x in images.items()}
    for name, got in features.items():
        torch.testing.assert_close(got, torch.from_numpy(recorded[name]), rtol=1e-5, atol=1e-6)
    metric = FrechetDistance(extractor, moments(features["A"]))
    for batch in images["B"].split(64):
        metric.update(batch)
    expected = json.loads((folder / "expected_images.json").read_text())["tiny"]
    theirs = expected["torch_fidelity"]
    assert float(metric.compute()) == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6)
    mean, sd = kernel_distance_subsets(features["A"], features["B"], 100, 100)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=2e-6)
    assert sd == pytest.approx(theirs["kernel_inception_distance_std"], abs=2e-6)
    score = inception_score_splits(extractor.with_logits(images["B"])[1])
    assert score == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), abs=1e-5)
    prc = precision_recall_density_coverage(features["A"], features["B"], 3)
    assert prc["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)
    assert prc["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)
