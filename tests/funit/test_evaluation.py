"""The protocol on translators whose scores are known."""

import itertools
import math
from functools import partial

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.funit import evaluation
from lit_gen.funit.evaluation import Measures, TargetClassifier, copy_content, evaluate, paste_example, sweep

LEVELS = [40, 120, 200]  # class t: all pixels near LEVELS[t]; content: a faint pattern on top


def pattern(n: int) -> torch.Tensor:
    return torch.randint(0, 20, (n, 1, 16, 16), generator=torch.Generator().manual_seed(n))


def image(level: int, content: torch.Tensor) -> torch.Tensor:
    return (content + level).to(torch.uint8)


CONTENTS = image(80, pattern(7))
EXAMPLES = {f"class {t}": image(level, pattern(4)) for t, level in enumerate(LEVELS)}


def by_brightness(images: torch.Tensor) -> torch.Tensor:
    """Logits of a source class of level 80 and the three target classes; sharp, so that scores are whole
    numbers."""
    means = images.double().mean((1, 2, 3))[:, None]
    return -1e3 * (means - torch.tensor([80.0, *LEVELS]) - 9.5).abs()


def truth(i: int, name: str) -> torch.Tensor:
    return image(LEVELS[int(name[-1])], pattern(7)[i])


def perfect(content: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    level = classes[0].mean() - pattern(4).float().mean() / 127.5
    nearest = min(LEVELS, key=lambda known: abs((level.item() + 1) * 127.5 - known))
    return (((content + 1) * 127.5).round() - 80 + nearest).to(torch.uint8)


MEASURES = Measures(
    classifiers={
        "all": TargetClassifier(by_brightness, [1, 2, 3]),
        "test": TargetClassifier(lambda x: by_brightness(x)[:, 1:], [0, 1, 2]),
    },
    content_features=lambda x: x.float() / 10,
    features=lambda x: x.double().mean((2, 3)),
    distance=lambda features, name: (features.mean() - EXAMPLES[name].double().mean()).abs().item(),
    distance_name="mean_level",
    truth=truth,
)


def test_perfect_translator():
    scores = evaluate(perfect, CONTENTS, EXAMPLES, MEASURES, batch_size=3)
    assert scores["top1_all"] == scores["top1_test"] == scores["top5_all"] == 1
    assert scores["l1"] == 0 and scores["ssim"] == pytest.approx(1)
    assert scores["dipd"] == pytest.approx(0, abs=1e-4)  # the style, a level, is normalised away
    assert scores["is_test"] == pytest.approx(3)  # sure of itself, and evenly over three classes
    assert scores["mean_level"] < 1


def test_copying_the_content():
    """Class never reached by the all-class judge, content untouched, distances those of the levels."""
    scores = evaluate(copy_content, CONTENTS, EXAMPLES, MEASURES)
    assert scores["top1_all"] == 0
    assert scores["top1_test"] == pytest.approx(1 / 3)  # all are put in one of the three
    assert scores["dipd"] == 0
    assert scores["is_all"] == pytest.approx(1)
    assert scores["l1"] == pytest.approx((40 + 40 + 120) / 3 / 255)


def test_pasting_an_example():
    paste = partial(paste_example, generator=torch.Generator().manual_seed(0))
    scores = evaluate(paste, CONTENTS, EXAMPLES, MEASURES)
    assert scores["top1_all"] == 1
    assert scores["dipd"] == pytest.approx(2, rel=0.2)  # independent patterns of unit variance
    translated = paste_example(torch.zeros(64, 1, 16, 16), EXAMPLES["class 1"] / 127.5 - 1)
    assert {tuple(x.flatten().tolist()) for x in translated} == {
        tuple(x.flatten().tolist()) for x in EXAMPLES["class 1"]
    }


def test_batches_do_not_matter():
    whole = evaluate(perfect, CONTENTS, EXAMPLES, MEASURES, batch_size=100)
    cut = evaluate(perfect, CONTENTS, EXAMPLES, MEASURES, batch_size=2)
    assert whole == pytest.approx(cut, rel=1e-6, abs=1e-6)


def test_top5_and_inception_score_by_hand():
    """Logits that put the target at rank 4 of 8: in the top five, not first. Uniform p: Inception score 1."""
    ranked = torch.arange(8.0).expand(7, -1)
    classifiers = {
        "ranked": TargetClassifier(lambda x: ranked[: len(x)], [4, 4, 4]),
        "flat": TargetClassifier(lambda x: ranked[: len(x)] * 0, [0, 0, 0]),
    }
    scores = evaluate(copy_content, CONTENTS, EXAMPLES, Measures(classifiers=classifiers))
    assert (scores["top1_ranked"], scores["top5_ranked"]) == (0, 1)
    assert scores["is_ranked"] == pytest.approx(1) and scores["is_flat"] == pytest.approx(1)
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    alternating = {"two": TargetClassifier(lambda x: p.log().repeat(4, 1)[: len(x)], [0, 0, 0])}
    scores = evaluate(copy_content, CONTENTS[:6], EXAMPLES, Measures(classifiers=alternating))
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert scores["is_two"] == pytest.approx(math.exp(kl))
    assert scores["top1_two"] == 0.5


def test_sweep_shows_the_first_k():
    seen = []

    def translate(content: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        seen.append(len(classes))
        return copy_content(content, classes)

    scores = sweep(translate, CONTENTS, EXAMPLES, Measures(truth=truth), ks=(1, 3))
    assert seen == [1, 1, 1, 3, 3, 3]
    assert scores[1] == scores[3] and set(scores) == {1, 3}
    with pytest.raises(ConfigError, match=r"k=5: class 'class 0' shows 4 images"):
        sweep(translate, CONTENTS, EXAMPLES, Measures(), ks=(1, 5))
    with pytest.raises(ConfigError, match=r"0 content images and 3 target classes"):
        evaluate(translate, CONTENTS[:0], EXAMPLES, Measures())


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_mean_of_its_definition_over_all_windows(channels):
    """Wang et al. 2004, eq. 13, window by window with a weighted mean and variance."""
    a = torch.randint(0, 256, (3, channels, 13, 12), dtype=torch.uint8)
    b = (a.float() + 30 * torch.randn(a.shape)).clamp(0, 255).to(torch.uint8)
    line = torch.exp(-((torch.arange(11.0).double() - 5) ** 2) / (2 * 1.5**2))
    weight = line[:, None] * line / line.sum() ** 2
    expected = []
    for top, left in itertools.product(range(3), range(2)):
        x, y = (z[..., top : top + 11, left : left + 11].double() for z in (a, b))
        mx, my = ((weight * z).sum((2, 3), keepdim=True) for z in (x, y))
        xx, yy, xy = ((weight * d).sum((2, 3)) for d in ((x - mx) ** 2, (y - my) ** 2, (x - mx) * (y - my)))
        mx, my, c1, c2 = mx[..., 0, 0], my[..., 0, 0], 2.55**2, 7.65**2
        similarity = (2 * mx * my + c1) * (2 * xy + c2) / ((mx**2 + my**2 + c1) * (xx + yy + c2))
        expected.append(similarity.mean(1))
    expected = torch.stack(expected).mean(0)
    torch.testing.assert_close(evaluation.ssim(a, b).double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigError, match="window of 11 does not fit"):
        evaluation.ssim(a[..., :8], b[..., :8])


def test_dipd_ignores_style():
    """A scale and a shift of every map cost nothing; independent maps cost 2, twice the unit variance."""
    a, b = torch.randn(2, 4, 5, 32, 32)
    assert evaluation.dipd(a, 3 * a - 7).max() < 1e-8
    torch.testing.assert_close(evaluation.dipd(a, b), torch.full((4,), 2.0), rtol=0.05, atol=0)


def test_perceptual_distance_is_to_the_truth_or_else_to_the_content():
    def brightness(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.double().mean((1, 2, 3)) - b.double().mean((1, 2, 3))).abs()

    known = evaluate(perfect, CONTENTS, EXAMPLES, Measures(perceptual=brightness, truth=truth))
    assert known["lpips"] == 0 and "lpips_content" not in known
    unknown = evaluate(perfect, CONTENTS, EXAMPLES, Measures(perceptual=brightness))
    assert unknown["lpips_content"] == pytest.approx(sum(abs(level - 80) for level in LEVELS) / 3)
    assert "lpips" not in unknown
