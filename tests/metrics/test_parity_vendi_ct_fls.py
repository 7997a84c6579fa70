"""Against the recorded numbers of vendi-score, data-copying, and dgm-eval (goldens/metrics): any folder of
its form, whatever its sizes and cases.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_gen.metrics.copying import cell_statistics, copying, projected, rank_statistic
from lit_gen.metrics.fls import feature_likelihood
from lit_gen.metrics.vendi import vendi_of_similarities, vendi_score

pytestmark = pytest.mark.parity

FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "metrics"
if not (FOLDER / "expected_vendi.json").exists():
    pytest.skip(f"{FOLDER} holds no goldens: others are being replayed", allow_module_level=True)


def cases(name: str) -> dict:
    path = FOLDER / f"expected_{name}.json"
    return json.loads(path.read_text())["cases"] if path.exists() else {}


VENDI, CT, FLS = cases("vendi"), cases("ct"), cases("fls")


def rows(named: dict, dtype: torch.dtype = torch.float64) -> Tensor:
    features = torch.from_numpy(np.load(FOLDER / f"{named['file']}.npy"))
    start, stop = named["rows"]
    part = features[start:stop].to(dtype)
    return part[:1].expand(len(part), -1) if named.get("repeat") else part


def scores(entry: dict, name: str = r"q(.+)") -> list[tuple[float, float]]:
    """(q, score) of every entry called q<order>."""
    found = ((re.fullmatch(name, key), value) for key, value in entry.items())
    return [(float(match[1]), value) for match, value in found if match]


def check_vendi(got: float, q: float, expected: float, case: dict, label: str) -> None:
    if case["set"].get("repeat"):  # rounding errors count in the recorded ones
        assert got == pytest.approx(1, abs=1e-9), label
    elif q >= 1:
        assert got == pytest.approx(expected, rel=1e-9), label
    else:
        assert got == pytest.approx(expected, rel=1e-9 if q < 0.5 else 1e-5), label


@pytest.mark.parametrize("name", VENDI)
def test_vendi_of_cosines(name):
    case = VENDI[name]
    x = rows(case["set"])
    assert x.shape == (case["n"], case["d"])
    trusted = case["score_dual"] if len(x) > x.shape[1] else case["score_K_of_cosine"]
    for q, expected in scores(trusted):
        check_vendi(vendi_score(x, q).value, q, expected, case, f"q={q}")
    for q, expected in scores(case["score_K_of_cosine"]) + scores(case["score_dual"]):
        if q >= 1:
            check_vendi(vendi_score(x, q).value, q, expected, case, f"q={q}")
    for key in ("score_X_whatever_q", "dgm_eval_linear"):
        if key in case:
            check_vendi(vendi_score(x).value, 1, case[key], case, key)
    for q, expected in scores(case.get("float32", {}), r"score_\w+_q(.+)"):
        assert vendi_score(x, q).value == pytest.approx(expected, rel=1e-4 if q >= 1 else 5e-2)


@pytest.mark.parametrize("name", VENDI)
def test_vendi_of_similarities(name):
    case = VENDI[name]
    x = rows(case["set"])
    norm = x.square().sum(1).mean().sqrt()
    z = x / x.norm(dim=1, keepdim=True)
    for q, expected in scores(case.get("score_X_not_normalized", {})):
        got = vendi_of_similarities((x / norm) @ (x / norm).T, q)
        check_vendi(got, q, expected, case, "not normalized")
    if rbf := case.get("rbf"):
        squares = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
        for q, expected in scores(rbf):
            got = vendi_of_similarities((-squares / (2 * rbf["sigma"] ** 2)).exp(), q)
            check_vendi(got, q, expected, case, f"rbf, q={q}")
    if weighted := case.get("weighted"):
        seed = int(re.search(r"RandomState\((\d+)\)", weighted["p"])[1])
        p = torch.from_numpy(np.random.RandomState(seed).rand(len(x)))
        for q, expected in scores(weighted):
            check_vendi(vendi_score(x, q, p).value, q, expected, case, f"weighted, q={q}")
            check_vendi(vendi_of_similarities(z @ z.T, q, p / p.sum()), q, expected, case, f"weighted, q={q}")
    if "dgm_eval_polynomial" in case:
        got = vendi_of_similarities((z @ z.T / x.shape[1] + 1) ** 3)
        assert got == pytest.approx(case["dgm_eval_polynomial"], rel=1e-9)
    if "intdiv_K_q1_of_cosine" in case:
        assert float(1 - (z @ z.T).mean()) == pytest.approx(case["intdiv_K_q1_of_cosine"], abs=1e-9)


def sets_of(case: dict) -> dict[str, Tensor]:
    sets = {name: rows(named) for name, named in case["sets"].items()}
    if copies := case.get("copies"):
        m = copies.get("m", len(sets["generated"]))
        noise = np.random.RandomState(copies["seed"]).standard_normal((m, sets["train"].shape[1]))
        sets["generated"] = sets["train"][:m] + copies["noise"] * torch.from_numpy(noise)
    return sets


@pytest.mark.parametrize("name", CT)
def test_copying(name):
    case, stored = CT[name], np.load(FOLDER / "ct_cells.npz")
    named = sets_of(case)
    sets = named["train"], named["test"], named["generated"]
    assert list(map(len, sets)) == [case["n_train"], case["n_test"], case["n_generated"]]
    cells = tuple(torch.from_numpy(stored[f"{name}_{s}_cells"]) for s in ("train", "test", "generated"))
    counts = [torch.bincount(c.long(), minlength=case["k"]).tolist() for c in cells]
    assert counts == [case["cell_counts"][s] for s in ("train", "test", "generated")]
    assert rank_statistic(*sets).value == pytest.approx(case["Zu_global"], abs=1e-9)
    if components := case.get("pca"):
        sets = projected(sets, components)
    within = [estimate.value for estimate in cell_statistics(sets, cells)]
    assert within == pytest.approx(case["Zu_cells"], abs=1e-9)
    taus = {float(key.removeprefix("tau")): value for key, value in case["C_T"].items()}
    for tau, expected in taus.items():
        assert copying(*sets, cells, tau).value == pytest.approx(expected, abs=1e-9), tau
    if (theirs := case.get("dgm_eval_compute_CTscore_kmeans_seed0")) is not None:
        assert copying(*sets, cells).value == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("name", FLS)
def test_feature_likelihood(name):
    case = FLS[name]
    sets = sets_of(case)
    if case["copies"]:
        sets["generated"] = sets["generated"].float()
    got = feature_likelihood(*(sets[s] for s in ("train", "baseline", "test", "generated")))
    one_center = 100 / len(sets["generated"])
    for precision, tolerance in (("float64", 1e-6), ("float32", 3e-6)):
        expected = case[precision]
        assert got.score == pytest.approx(expected["fls"], rel=tolerance)
        assert got.overfit == pytest.approx(expected["fls_overfit"], abs=1.01 * one_center)
        assert got.nll == pytest.approx(expected["generated_nll_on_test"], rel=tolerance)
        losses = [(key, value) for key, value in expected.items() if key.startswith("losses_at_")]
        for key, values in losses:
            steps = map(int, key.removeprefix("losses_at_").split("_"))
            assert [got.losses[i] for i in steps] == pytest.approx(values, rel=tolerance)
