import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.score.condition import Condition
from lit_gen.score.denoiser import CountingDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from lit_gen.score.guidance import (
    ClassifierGuidance,
    Guidance,
    Unconditional,
    classifier_free_guidance,
)
from lit_gen.score.samplers import heun
from lit_gen.score.sde import EDM, VE, VP, Flow

MEANS = torch.tensor([[0.6, -0.4, 0.1, 0.5], [-0.5, 0.3, 0.4, -0.6], [0.0, 0.7, -0.6, 0.2]]).reshape(
    3, 1, 2, 2
)
each_process = pytest.mark.parametrize("process", [EDM(), VE(), VP(), Flow()], ids=lambda p: type(p).__name__)


def mixture(process):
    return GaussianMixtureDenoiser(process, MEANS, torch.tensor(0.04), torch.tensor([0.2, 0.5, 0.3]))


def noisy(process, n=4):
    levels = torch.tensor([0.1, 0.3, 1.0, 3.0], dtype=torch.float64)[:n]
    t, g = process.time(levels), keyed_generator("noisy")
    return process.marginal(MEANS[[0, 1, 2, 0]].double(), t, torch.randn(4, 1, 2, 2, generator=g).double()), t


LABEL = torch.tensor([0, 1, 2, 1])


@each_process
def test_guidance_is_that_of_the_scores(process):
    """score = s_guide + w (s - s_guide), Equation 6 of Ho & Salimans."""
    main, guide = mixture(process), GaussianDenoiser(process, MEANS[0], torch.tensor(0.3))
    x, t = noisy(process)
    guided = Guidance(main, guide, 2.5).score(x, t)
    s, s_guide = main.score(x, t), guide.score(x, t)
    assert_close(guided, s_guide + 2.5 * (s - s_guide), rtol=1e-7, atol=1e-7)


@each_process
def test_classifier_free_guidance_sharpens_the_class(process):
    """p(x) p(c|x)^w: weight 0 is the unconditional denoiser, 1 the conditional one, at which the guide is not
    called.
    """
    counted = CountingDenoiser(mixture(process))
    x, t = noisy(process)
    assert_close(classifier_free_guidance(counted, 0.0)(x, t, LABEL), counted(x, t))
    before = counted.calls
    assert_close(classifier_free_guidance(counted, 1.0)(x, t, LABEL), mixture(process)(x, t, LABEL))
    assert counted.calls == before + 1
    hot = nn.functional.one_hot(LABEL, 3).float()
    assert_close(mixture(process)(x, t, hot), mixture(process)(x, t, LABEL))
    assert_close(Unconditional(counted)(x, t, LABEL), counted(x, t))
    assert_close(mixture(process)(x, t, torch.zeros(4, 3)), counted(x, t))


@each_process
def test_classifier_guidance_with_the_exact_classifier_is_the_conditional_denoiser(process):
    """Bayes: grad log p(x|c) = grad log p(x) + grad log p(c|x)."""
    model = mixture(process)
    x, t = noisy(process)

    def classifier(x_t, t):
        return model._joint(x_t, t)[0]

    guided = ClassifierGuidance(model, classifier)
    assert_close(guided(x, t, LABEL), model(x, t, LABEL), rtol=1e-8, atol=1e-8)
    assert_close(guided(x, t), model(x, t))
    twice = ClassifierGuidance(model, classifier, weight=2.0)
    cfg = classifier_free_guidance(model, 2.0)
    assert_close(twice(x, t, LABEL), cfg(x, t, LABEL), rtol=1e-8, atol=1e-8)


def test_interval_limits_guidance_to_its_noise_levels():
    process = VP()
    x, t = noisy(process)  # levels 0.1, 0.3, 1, 3
    model = mixture(process)
    guided = classifier_free_guidance(model, 3.0, interval=(0.2, 2.0))(x, t, LABEL)
    full, plain = classifier_free_guidance(model, 3.0)(x, t, LABEL), model(x, t, LABEL)
    assert_close(guided[1:3], full[1:3])
    assert_close(guided[[0, 3]], plain[[0, 3]])


def test_conditional_samples_are_of_their_class():
    process, label = EDM(), torch.arange(3).repeat(50)
    x = process.prior_sample((150, 1, 2, 2), keyed_generator("x"))
    samples = heun(mixture(process), x, label=label)
    assert (
        torch.cdist(samples.flatten(1), MEANS.flatten(1).double()).argmin(1) == label
    ).float().mean() > 0.98
    mean = samples.view(50, 3, 1, 2, 2).mean(0)
    assert_close(mean, MEANS.double(), atol=0.12, rtol=0)


def test_guide_on_another_process_is_refused():
    with pytest.raises(ConfigError, match="wrap it: ReparameterizedDenoiser"):
        Guidance(mixture(EDM()), mixture(VP()), 2.0)


def test_a_classifier_guides_a_model_of_vectors_which_is_told_them_still():
    class Told(GaussianDenoiser):
        def forward(self, x_t, t, label=None):
            heard.append(label)
            return super().forward(x_t, t)

    heard = []
    told = Condition(torch.tensor([0, 2]), torch.tensor([[1.0], [2.0]]))
    model = Told(EDM(), torch.zeros(1, 2, 2), torch.tensor(0.25))
    guided = ClassifierGuidance(model, lambda x, t: x.flatten(1)[:, :3])
    guided(torch.randn(2, 1, 2, 2), torch.tensor(1.0), told)
    assert list(heard[0].parts()) == ["vector"] and heard[0].vector is told.vector
    guided(torch.randn(2, 1, 2, 2), torch.tensor(1.0), told.label)
    assert heard[1] is None
