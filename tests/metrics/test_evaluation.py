"""The one pass gives the functions' values, and keeps a random part that depends on the seed alone."""

import math

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.metrics import Evaluation, compare, digits64, frechet_distance, moments
from lit_gen.metrics.copying import copying
from lit_gen.metrics.fls import feature_likelihood
from lit_gen.metrics.functional import inception_score
from lit_gen.metrics.kernels import kernel_distance
from lit_gen.metrics.neighbours import authenticity, precision_recall_density_coverage
from lit_gen.metrics.vendi import vendi_score


def images(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 1, 4, 4, generator=g) * 40 + 120 + 5 * seed).clamp(0, 255).to(torch.uint8)


def summary(pixels, x, order=None, batch=32, **options):
    one = Evaluation(pixels, **options)
    order = torch.arange(len(x)) if order is None else order
    for rows in order.split(batch):
        one.update(x[rows], rows, rows % 3 if options.get("num_classes") else None)
    return one.summary()


def test_the_names_and_the_functions_values(pixels):
    x, y, z = images(150, 0), images(200, 1), images(250, 2)
    sets = [summary(pixels, images) for images in (x, y, z)]
    results = compare(*sets[:2], training=sets[2])
    real, fake = pixels(x), pixels(y)
    expected = {
        "fd": frechet_distance(moments(real), moments(fake)),
        "kd": kernel_distance(real, fake).value,
        "authpct": authenticity(pixels(z), fake).value,
        "fdtrain": frechet_distance(moments(pixels(z)), moments(fake)),
        "vendi": vendi_score(fake).value,
        "ct": copying(*(sets[i].features for i in (2, 0, 1))).value,  # k-means depends on the order
        "is": inception_score(fake[:, :10]).value,
    }
    expected |= {k: e.value for k, e in precision_recall_density_coverage(real, fake).items()}
    expected = {f"{name}_pixels_00000000_n200": value for name, value in expected.items()}
    values = {name: value for name, (value, _) in results.items()}
    assert values.pop("fdinf_pixels_00000000_n200") < expected["fd_pixels_00000000_n200"]
    assert values == pytest.approx(expected, rel=1e-10)
    assert all(se > 0 for _, se in results.values())


def test_the_kept_part_does_not_depend_on_order_or_batch(pixels):
    x = images(300, 0)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    a, b = (
        summary(pixels, x, max_stored_features=40),
        summary(pixels, x, shuffled, batch=7, max_stored_features=40),
    )
    assert torch.equal(a.index, b.index) and torch.equal(a.features, b.features)
    assert torch.equal(a.features, pixels(x)[a.index])
    assert a.n == 300 and len(a.index) == 40
    other = summary(pixels, x, max_stored_features=40, seed=1)
    assert 0 < len(set(a.index.tolist()) & set(other.index.tolist())) < 20


def test_the_kept_part_is_a_uniform_one(pixels):
    counts = torch.zeros(100)
    for seed in range(400):
        one = Evaluation(pixels, max_stored_features=20, seed=seed)
        one.update(torch.zeros(100, 1, 4, 4, dtype=torch.uint8), torch.arange(100))
        counts[one.summary().index] += 1
    # Binomial(400, 0.2): 80 +- 8; chi^2 with 99 degrees of freedom (and a factor 0.8), 1 in 1000 below 56 or
    # above 148.
    chi = float(((counts - 80) ** 2 / 64).sum()) * 99 / 100
    assert 56 < chi < 150 and counts.max() < 80 + 4.5 * 8 and counts.min() > 80 - 4.5 * 8


def test_classes(pixels):
    x, y = images(300, 0), images(330, 1)
    options = {"num_classes": 3, "max_stored_features": 400}
    results = compare(summary(pixels, x, **options), summary(pixels, y, **options))
    within = [frechet_distance(moments(pixels(x[c::3])), moments(pixels(y[c::3]))) for c in range(3)]
    for c in range(3):
        value, se = results[f"fdclass{c}_pixels_00000000_n110"]
        assert value == pytest.approx(within[c], rel=1e-10) and se > 0
    mean, se = results["fdclass_pixels_00000000_n330"]
    assert mean == pytest.approx(sum(within) / 3, rel=1e-10) and 0 < se < 1


def test_a_class_that_was_not_generated_is_nan(pixels):
    x = images(90, 0)
    one = Evaluation(pixels, num_classes=3)
    one.update(x, torch.arange(90), torch.arange(90) % 2)
    results = compare(summary(pixels, x, num_classes=3), one.summary())
    assert math.isnan(results["fdclass2_pixels_00000000_n0"].value)
    assert math.isnan(results["fdclass_pixels_00000000_n90"].value)


def test_misuse_is_named(pixels):
    one = Evaluation(pixels)
    with pytest.raises(ConfigError, match="need an index each"):
        one.update(images(5, 0), torch.arange(4))
    with pytest.raises(ConfigError, match="needs a label"):
        Evaluation(pixels, num_classes=3).update(images(5, 0), torch.arange(5))
    one.update(images(5, 0), torch.tensor([1, 2, 3, 4, 1]))
    with pytest.raises(ConfigError, match="given twice"):
        one.summary()
    with pytest.raises(ConfigError, match="cannot be compared"):
        other = Evaluation(digits64())
        other.update(images(90, 0), torch.arange(90))
        compare(summary(pixels, images(9, 0)), other.summary())
    with pytest.raises(ConfigError, match="max_stored_features=0"):
        Evaluation(pixels, max_stored_features=0)


def test_neighbors_are_left_out_of_few_images_unless_they_are_asked_for(pixels):
    real, fake = summary(pixels, images(4, 0)), summary(pixels, images(40, 1))
    names = {name.split("_")[0] for name in compare(real, fake)}
    assert "fd" in names and not names & {"precision", "recall", "density", "coverage"}
    with pytest.raises(ConfigError, match="recall needs more than k=5 images in both sets, there are 4"):
        compare(real, fake, only=["recall"])


def test_the_slow_one_is_computed_where_it_is_chosen(pixels):
    x, y, z = (summary(pixels, images(100, seed)) for seed in range(3))
    assert not [name for name in compare(x, y, training=z) if name.startswith("fls")]
    halves = z.features[:50], z.features[50:]
    expected = feature_likelihood(*halves, x.features, y.features[:50]).score
    assert compare(x, y, training=z, only=["fls"]) == {"fls_pixels_00000000_n50": (expected, None)}
    with pytest.raises(ConfigError, match="fls needs the training images"):
        compare(x, y, only=["fls"])
