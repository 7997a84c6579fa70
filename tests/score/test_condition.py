"""A condition of a class, a vector, and an image: in networks, samplers, restoration, likelihoods, losses."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lit_gen.errors import ConfigError
from lit_gen.module import SingleOptimizerModule
from lit_gen.score import Condition, ConditionedDenoiser, Denoiser, edm_loss, log_likelihood
from lit_gen.score.denoiser import GaussianMixtureDenoiser
from lit_gen.score.guidance import Unconditional, classifier_free_guidance
from lit_gen.score.module import ScoreModule
from lit_gen.score.networks import ADM, DDPM, EDM2, DiT, NCSNpp, UViT, embeddings, layers
from lit_gen.score.precondition import EDMPrecondition
from lit_gen.score.restoration import SuperResolution, pigdm
from lit_gen.score.samplers import heun, rk45
from lit_gen.score.sde import EDM

SMALL = {"image_size": 8, "channels": 1, "base_channels": 32, "channel_mult": (1, 2), "num_blocks": 1}


def transformer(kind, num_classes=0, vector_dim=0, condition_channels=0, **unet):
    return kind(
        *(8, 1, 2, 32, 2, 2),
        num_classes=num_classes,
        vector_dim=vector_dim,
        condition_channels=condition_channels,
    )


TRANSFORMERS = [partial(transformer, kind) for kind in (UViT, DiT)]
each_network = pytest.mark.parametrize("network", [NCSNpp, DDPM, ADM, EDM2, *TRANSFORMERS])


def randomized(net):
    """Every weight away from zero, so that nothing is without effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def inputs(n=3):
    g = torch.Generator().manual_seed(0)
    x, level = torch.randn(n, 1, 8, 8, generator=g), torch.rand(n, generator=g)
    return x, level, condition(n)


def condition(n=3):
    g = torch.Generator().manual_seed(2)
    return Condition(
        torch.arange(n) % 2,
        3 * torch.randn(n, 2, generator=g) + 5,
        torch.rand(n, 1, 4, 4, generator=g) * 2 - 1,
    )


def network(kind=NCSNpp, **options):
    torch.manual_seed(0)
    options = {"num_classes": 2, "vector_dim": 2, "condition_channels": 1} | options
    return randomized(kind(**SMALL, dropout=0.0, **options))


@each_network
def test_each_part_changes_the_output_and_a_dropped_one_is_that_of_no_condition(network):
    torch.manual_seed(0)
    net = randomized(network(**SMALL, num_classes=2, vector_dim=2, condition_channels=1, dropout=0.0))
    x, level, told = inputs()
    all_of_it = net(x, level, told.label, None, told.vector, told.image)
    for part in ("label", "vector", "image"):
        rest = told.without(part)
        without = net(x, level, rest.label, None, rest.vector, rest.image)
        dropped = told.kept({part: torch.tensor([False, False, True])})
        some = net(x, level, dropped.label, None, dropped.vector, dropped.image)
        assert ((all_of_it - without).abs().amax((1, 2, 3)) > 1e-4).all(), part
        assert_close(some[:2], without[:2])
        assert_close(some[2], all_of_it[2])


@each_network
def test_without_conditions_the_weights_and_outputs_are_those_before(network):
    """No entry more, no random number more."""
    torch.manual_seed(0)
    plain = network(**SMALL, num_classes=2)
    torch.manual_seed(0)
    same = network(**SMALL, num_classes=2, vector_dim=0, condition_channels=0)
    assert plain.state_dict().keys() == same.state_dict().keys()
    assert not [name for name in plain.state_dict() if "vector" in name]
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), same.state_dict().values(), strict=True)
    )
    x, level, told = inputs()
    with pytest.raises(ConfigError, match="vector_dim"):
        plain(x, level, None, None, told.vector)
    with pytest.raises(ConfigError, match="condition_channels"):
        plain(x, level, None, None, None, told.image)


def test_a_vector_is_standardized_by_the_training_set_once():
    embedding = embeddings.VectorEmbedding(2, torch.nn.Identity())
    vectors = torch.tensor([[1.0, 7.0], [3.0, 7.0], [torch.nan, 7.0]])
    embedding.fit(vectors)
    assert embedding.mean.tolist() == [2.0, 7.0] and embedding.std.tolist() == [1.0, 1.0]
    like = torch.zeros(3, 1)
    assert embedding(vectors, like).tolist() == [[-1, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1]]
    assert embedding(None, like).tolist() == [[0, 0, 0, 0]] * 3
    embedding.fit(100 * vectors)  # as when a run goes on, or starts from its weights
    assert embedding.mean.tolist() == [2.0, 7.0]


def test_a_smaller_image_is_enlarged_and_a_larger_one_refused():
    x = torch.zeros(2, 1, 8, 8)
    image = torch.rand(2, 3, 4, 4)
    together = layers.with_condition(x, image, 3)
    assert together.shape == (2, layers.input_channels(1, 3), 8, 8)
    enlarged = torch.nn.functional.interpolate(image, (8, 8), mode="bicubic", align_corners=False)
    assert torch.equal(together[:, 1:4], enlarged) and torch.equal(together[:, 4], torch.ones(2, 8, 8))
    holed = torch.rand(2, 3, 8, 8)
    holed[:, :, 0, 0] = torch.nan
    together = layers.with_condition(x, holed, 3)
    assert (together[:, 1:, 0, 0] == 0).all() and together[:, 4].sum() == 2 * 63
    for wrong in (torch.zeros(2, 3, 9, 8), torch.zeros(2, 1, 8, 8), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ConfigError, match="condition image of shape"):
            layers.with_condition(x, wrong, 3)


def denoiser():
    return Denoiser(network().double(), EDM(), EDMPrecondition())


def one_by_one(function, told, *tensors):
    """function(bound denoiser, label, *tensors) of all rows together, and of each alone."""
    net = denoiser()
    rows = torch.arange(len(told))
    together = function(ConditionedDenoiser(net, told), rows, *tensors)
    alone = [
        function(
            ConditionedDenoiser(net, told.rows(rows[i : i + 1])), rows[:1], *(x[i : i + 1] for x in tensors)
        )
        for i in rows
    ]
    return together, torch.cat(alone)


@pytest.mark.parametrize("guided", [False, True])
def test_rk45_takes_the_right_rows_along(guided):
    """Rows end at different steps, and are then left out of the batch."""
    x = 5 * torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x *= torch.tensor([0.1, 1.0, 10.0])[:, None, None, None]

    def solve(bound, label, x):
        if guided:
            inner = classifier_free_guidance(bound.denoiser, 1.5)
            bound = ConditionedDenoiser(inner, bound.condition)
        return rk45(bound, x, label=label, rtol=1e-2, atol=1e-2)

    together, alone = one_by_one(solve, condition(), x)
    assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_restoration_and_likelihood_of_a_condition_are_those_of_each_image_alone():
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    operator = SuperResolution(2)

    def restore(bound, label, x, y):
        return pigdm(bound, x, operator, y, num_steps=4, label=label)

    together, alone = one_by_one(restore, condition(), 80 * x, operator(0.3 * x))
    assert_close(together, alone, rtol=1e-9, atol=1e-9)

    def likelihood(bound, label, x, probes):
        return log_likelihood(bound, x, probes=probes[None], label=label, rtol=1e-2, atol=1e-2).log_prob

    together, alone = one_by_one(likelihood, condition(), 0.3 * x, x.sign())
    assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_a_bound_class_is_the_class():
    means = torch.tensor([0.6, -0.5]).reshape(2, 1, 1, 1)
    mixture = GaussianMixtureDenoiser(EDM(), means, torch.tensor(0.04), torch.tensor([0.5, 0.5]))
    label, x, t = torch.tensor([1, 0, 1]), torch.zeros(3, 1, 1, 1), torch.tensor(0.5)
    bound = ConditionedDenoiser(mixture, Condition(label))
    assert torch.equal(bound(x, t), mixture(x, t, label))
    assert torch.equal(bound(x[:2], t, torch.tensor([2, 1])), mixture(x[:2], t, label[[2, 1]]))
    with pytest.raises(ConfigError, match="2 images and a condition of 3 rows"):
        bound(x[:2], t)


def test_unconditional_leaves_out_what_it_is_asked_to():
    net, (x, _, told), t = denoiser(), inputs(), torch.tensor(0.5)
    assert torch.equal(Unconditional(net)(x, t, told), net(x, t))
    assert torch.equal(Unconditional(net, ["vector"])(x, t, told), net(x, t, told.without("vector")))
    assert torch.equal(Unconditional(net, ["vector"])(x, t, told.label), net(x, t, told.label))


def module(**options):
    options = {"num_classes": 2, "vector_dim": 2, "condition_channels": 1} | options
    sampler = partial(heun, num_steps=3)
    adam = partial(torch.optim.Adam, lr=1e-3)
    return ScoreModule(
        network(),
        EDM(),
        EDMPrecondition(),
        edm_loss(),
        adam,
        sampler,
        (1, 8, 8),
        **options,
    )


def test_samples_are_told_their_own_conditions():
    model, told = module(), condition(4)
    together = model.sample([0, 5, 2, 9], condition=told)
    assert torch.equal(together[1:2], model.sample([5], condition=told.rows([1])))
    assert not torch.equal(together[1:2], model.sample([5], condition=told.rows([0])))


def test_what_does_not_fit_is_refused_before_sampling():
    model, told = module(), condition(4)
    with pytest.raises(ConfigError, match=r"always told a condition vector.*give condition\.vector"):
        model.sample(range(4))
    with pytest.raises(ConfigError, match="4 rows for 3 images"):
        model.sample(range(3), condition=told)
    with pytest.raises(ConfigError, match="class 2: the classes are 0 to 1, and -1 is none"):
        model.sample(range(4), condition=Condition(torch.tensor([0, -1, 2, 1]), told.vector, told.image))
    with pytest.raises(ConfigError, match="vector of 3 numbers: the model takes 2"):
        model.sample(range(4), condition=Condition(None, torch.zeros(4, 3), told.image))
    with pytest.raises(ConfigError, match=r"3 channels, 4x4 .* the model takes 1 channels, at most 8x8"):
        model.sample(range(4), condition=Condition(None, told.vector, torch.zeros(4, 3, 4, 4)))
    with pytest.raises(ConfigError, match="takes no condition image; the conditions it takes: none"):
        plain = ScoreModule(
            network(num_classes=0, vector_dim=0, condition_channels=0),
            EDM(), EDMPrecondition(), edm_loss(), torch.optim.Adam, heun, (1, 8, 8),
        )  # fmt: skip
        plain.sample(range(4), condition=told.without("label", "vector"))


def test_vectors_are_read_for_an_embedding_that_has_no_mean_yet(monkeypatch):
    class Data:
        read = 0

        def vectors(self):
            self.read += 1
            return condition(4).vector

        def conditions(self, indices):
            return {}

    model, data = module(), Data()
    monkeypatch.setattr(SingleOptimizerModule, "on_fit_start", lambda self: None)
    monkeypatch.setattr(ScoreModule, "trainer", SimpleNamespace(datamodule=data))
    model.on_fit_start()
    means = [part.mean for part in model.modules() if isinstance(part, embeddings.VectorEmbedding)]
    assert_close(means, [condition(4).vector.mean(0)])
    model.on_fit_start()
    assert data.read == 1


def test_dropout_of_parts_is_keyed_and_validation_drops_nothing(monkeypatch):
    model = module(condition_dropout={"vector": 0.5, "all": 0.3}, label_dropout=0.2)
    assert model.dropout == {"label": 0.3, "vector": 0.5, "image": 0.3}
    told = condition(400)
    batch = {"label": told.label, "vector": told.vector, "condition_image": told.image, "image": told.image}

    class Trainer:
        world_size, global_rank = 1, 0

    monkeypatch.setattr(ScoreModule, "trainer", Trainer())
    dropped, again = model._condition(batch), model._condition(batch)
    assert isinstance(dropped, Condition) and isinstance(again, Condition)
    assert dropped.label is not None and dropped.vector is not None and dropped.image is not None
    assert torch.equal(dropped.vector.isnan(), again.vector.isnan())
    no_vector, no_image = dropped.vector.isnan().all(1), dropped.image.isnan().flatten(1).all(1)
    no_label = dropped.label.sum(1) == 0
    assert abs(no_image.double().mean() - 0.3) < 0.08
    assert abs(no_vector.double().mean() - (1 - 0.5 * 0.7)) < 0.08
    assert abs(no_label.double().mean() - (1 - 0.8 * 0.7)) < 0.08
    assert (no_vector & no_label)[no_image].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector_dim": 3}, r"model.vector_dim=3, and the network, a NCSNpp, has 2"),
        ({"condition_dropout": {"vektor": 0.1}}, r"condition_dropout.vektor=0.1: give probabilities of"),
        ({"condition_dropout": {"image": 1.1}}, r"condition_dropout.image=1.1"),
        ({"augment": object()}, "moves images away"),
    ],
)  # fmt: skip
def test_a_model_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        module(**options)
