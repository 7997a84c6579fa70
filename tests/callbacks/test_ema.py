import pytest
import torch
from torch import nn

from lit_gen.callbacks import EMA
from lit_gen.errors import ConfigError


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
        decays.append(ema.current_decay)
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
    from lit_gen import runs
    from lit_gen.callbacks import evaluating

    experiment = fit(tmp_path, "trainer.max_steps=10", "callbacks.ema.decay=0.5")
    module, ema = experiment.module, next(c for c in experiment.trainer.callbacks if isinstance(c, EMA))
    raw = [p.detach().clone() for p in module.ema_network().parameters()]
    assert not all(torch.equal(p, s) for p, s in zip(raw, ema.shadow.values(), strict=False))

    with evaluating(experiment.trainer):
        averaged = module.sample(range(2))
    plain = module.sample(range(2))
    assert not torch.equal(averaged, plain)

    loaded, _, _ = runs.load(tmp_path / "checkpoints" / "last.ckpt", device="cpu")
    assert torch.equal(loaded.sample(range(2)), averaged)
    loaded, _, _ = runs.load(tmp_path / "checkpoints" / "last.ckpt", ema=False, device="cpu")
    assert torch.equal(loaded.sample(range(2)), plain)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_impossible_decays(decay):
    with pytest.raises(ConfigError, match="for instance"):
        EMA(decay=decay)
