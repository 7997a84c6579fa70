import math

import pytest
import torch
from torch import nn

from lit_gen import models, runs
from lit_gen.callbacks import EMA, HalfLife, Power
from lit_gen.errors import ConfigError
from lit_gen.score.phema import exponent


def net_and_ema(**options):
    net = nn.Linear(3, 2).double()
    ema = EMA(**options)
    ema.shadow = {n: p.detach().clone() for n, p in net.named_parameters()}
    return net, ema


def test_the_average_is_the_weighted_sum_of_all_weights():
    net, ema = net_and_ema(decay=0.9, warmup=False)
    history = [net.weight.detach().clone()]
    for _ in range(5):
        with torch.no_grad():
            net.weight += torch.randn_like(net.weight)
        history.append(net.weight.detach().clone())
        ema.update(dict(net.named_parameters()))
    expected = 0.9**5 * history[0] + sum(0.1 * 0.9 ** (5 - k) * history[k] for k in range(1, 6))
    torch.testing.assert_close(ema.shadow["weight"], expected, rtol=0, atol=1e-14)


def test_warm_up_is_score_sdes():
    net, ema = net_and_ema(decay=0.99)
    decays = []
    for _ in range(2000):
        ema.update(dict(net.named_parameters()))
        decays.append(ema.decay_of(ema.num_updates))
    assert decays[0] == 2 / 11 and decays[9] == 11 / 20
    assert decays[-1] == 0.99


def test_the_network_gets_its_weights_back_even_after_an_error():
    net, ema = net_and_ema(decay=0.5, warmup=False)
    average = ema.shadow["weight"].clone()
    with torch.no_grad():
        net.weight += 1
    own = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.applied(net):
        assert torch.equal(net.weight, average)
        with pytest.raises(RuntimeError, match="holds its EMA weights"):
            ema.state_dict()
        raise RuntimeError("inside")
    assert torch.equal(net.weight, own)
    assert torch.equal(ema.state_dict()["shadow"]["weight"], average)


def test_evaluations_see_the_average_and_training_does_not(fit, tmp_path):
    from lit_gen.callbacks import evaluating

    experiment = fit(tmp_path, "trainer.max_steps=10", "callbacks.ema.decay=0.5")
    module, ema = experiment.module, next(c for c in experiment.trainer.callbacks if isinstance(c, EMA))
    raw = [p.detach().clone() for p in module.ema_network().parameters()]
    assert not all(torch.equal(p, s) for p, s in zip(raw, ema.shadow.values(), strict=False))

    with evaluating(experiment.trainer):
        averaged = module.sample(range(2))
    plain = module.sample(range(2))
    assert not torch.equal(averaged, plain)

    loaded, _, _ = models.load(tmp_path / "checkpoints" / "last.ckpt", device="cpu")
    assert torch.equal(loaded.sample(range(2)), averaged)
    loaded, _, _ = models.load(tmp_path / "checkpoints" / "last.ckpt", ema=False, device="cpu")
    assert torch.equal(loaded.sample(range(2)), plain)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_impossible_decays(decay):
    with pytest.raises(ConfigError, match="for instance"):
        EMA(decay=decay)


@pytest.mark.parametrize("ramp", [None, 0.05])
def test_half_life_in_images(ramp):
    """A share halves every `images` images; with a ramp, every 5 % of those seen, until that is more."""
    rule = HalfLife(images=1000, batch_size=10, ramp=ramp)
    late = 10_000
    assert math.prod(rule(n) for n in range(late, late + 100)) == pytest.approx(0.5)
    assert rule(100) == pytest.approx(0.5 ** (10 / (50 if ramp else 1000)))


@pytest.mark.parametrize("averages", [["[decay]"], ["[halflife]"], ["[power]", "~callbacks.ema"]])
def test_the_log_has_the_decay_of_every_update(fit, tmp_path, averages):
    """From the first batch on."""
    off = (f"~callbacks.{name}" for name in ("quality", "grid", "validation", "progress"))
    experiment = fit(
        tmp_path, f"callbacks/averages={averages[0]}", *averages[1:], "trainer.max_steps=3", *off
    )
    ema = next(c for c in experiment.trainer.callbacks if isinstance(c, EMA))
    logged = runs.history(tmp_path)["train/ema_decay"]
    assert logged == pytest.approx({n: ema.decay_of(n) for n in (1, 2, 3)}) and ema.num_updates == 3


def test_power_average_weighs_by_the_power_of_time():
    """The rule's weight of step n is proportional to n^gamma (up to the discretisation)."""
    rule = Power(0.1)
    gamma, last = exponent(0.1), 4000
    share = {
        n: (1 - rule(n)) * math.prod(rule(m) for m in range(n + 1, last + 1)) for n in (1000, 2000, 4000)
    }
    assert share[2000] / share[4000] == pytest.approx(0.5**gamma, rel=2e-2)
    assert share[1000] / share[2000] == pytest.approx(0.5**gamma, rel=2e-2)
    with pytest.raises(ConfigError, match=r"0\.2886"):
        Power(0.3)


def test_averages_of_other_lengths_after_training(fit, tmp_path, compose):
    """What was kept is reconstructed exactly, what was not nearly; the new file is a run like others."""
    from lit_gen.commands import average as averaging

    experiment = fit(tmp_path, "callbacks/averages=[decay,power]", "callbacks.checkpoint.every=1")
    short, long = (
        c for c in experiment.trainer.callbacks if isinstance(c, EMA) and isinstance(c.decay, Power)
    )
    assert len(list((tmp_path / "averages").glob("*.safetensors"))) == 2 * 20
    for ema in (short, long):
        weights, batch = averaging.reconstruct(tmp_path / "averages", ema.decay.std)
        assert batch == 20
        for name, w in weights.items():
            torch.testing.assert_close(w, ema.shadow[name], rtol=1e-4, atol=1e-6)
    between, _ = averaging.reconstruct(tmp_path / "averages", 0.075)
    mean = (
        sum((between[n] - s).square().sum() for n, s in short.shadow.items()),
        sum((short.shadow[n] - s).square().sum() for n, s in long.shadow.items()),
    )
    assert 0 < mean[0] < mean[1]  # between the two
    path = averaging.average(compose(f"run={tmp_path}", "std=0.075", config_name="average"))
    module, *_ = models.load(path, device="cpu")
    for name, p in module.ema_network().named_parameters():
        assert torch.equal(p, between[name])
    with pytest.raises(ConfigError, match="exists"):
        averaging.average(compose(f"run={tmp_path}", "std=0.075", config_name="average"))
    with pytest.raises(ConfigError, match="batch=77: averages were stored at 1, 2"):
        averaging.reconstruct(tmp_path / "averages", 0.1, 77)
    with pytest.raises(ConfigError, match=r"averages=\[decay,power\]"):
        averaging.reconstruct(tmp_path / "elsewhere", 0.1)
