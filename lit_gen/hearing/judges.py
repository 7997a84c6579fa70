"""Judges of what was restored: a network that hears the whole word, and one that hears the gap alone. Both
are trained on voices that neither the model nor the test has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gen.data.sound import LogMel
from lit_gen.hearing.trials import Trial, frames_of
from lit_gen.rng import key, keyed_generator
from lit_gen.schedules import train_one_cycle
from lit_gen.search.rewards import small_cnn

SHIFT = 2  # frames by which training pictures move
EPOCHS, BATCH, RATE, WIDTH = 15, 64, 3e-3, 24


def pictures(trials: Sequence[Trial], sound: LogMel) -> Tensor:
    """float32 (N, 1, bands, frames), clamped to [-1, 1]."""
    return sound.picture(torch.from_numpy(np.stack([t.wave for t in trials]))).clamp(-1, 1)


def gaps(trials: Sequence[Trial], sound: LogMel, touched: bool = False) -> Tensor:
    """bool (N, 1, 1, frames), see `frames_of`."""
    return torch.stack([frames_of(t.gap, sound, touched) for t in trials])[:, None, None]


@dataclass
class Judges:
    """`whole` and `piece` give logits of words for pictures (N, 1, bands, frames) in [-1, 1]."""

    whole: nn.Module
    piece: nn.Module

    @classmethod
    def trained(cls, trials: Sequence[Trial], sound: LogMel, classes: int, seed: int = 0) -> "Judges":
        """On the words of the judges' voices."""
        x, labels = pictures(trials, sound), torch.tensor([t.word for t in trials])
        heard = gaps(trials, sound)
        whole = _trained(x, torch.ones_like(heard), labels, classes, key(seed, "whole"))
        return cls(whole, _trained(x, heard, labels, classes, key(seed, "piece")))

    @classmethod
    def restored(cls, state: dict[str, dict[str, Tensor]], classes: int) -> "Judges":
        """From the state dicts of "whole" and "piece"."""
        nets = {name: small_cnn(1, classes, WIDTH).eval() for name in ("whole", "piece")}
        for name, net in nets.items():
            net.load_state_dict(state[name])
        return cls(**nets)

    @torch.no_grad()
    def say(self, x: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (N, words) by the whole picture, and by the frames of the gap (N, 1, 1, frames)."""
        return self.whole(x).softmax(1), self.piece(torch.where(gap, x, -1.0)).softmax(1)


def _trained(x: Tensor, heard: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        net = small_cnn(1, classes, WIDTH)
    steps = -(-len(x) // BATCH) * EPOCHS

    def losses() -> Iterator[Tensor]:
        for epoch in range(EPOCHS):
            g = keyed_generator(seed, epoch)
            for rows in torch.randperm(len(x), generator=g).split(BATCH):
                shift = int(torch.randint(-SHIFT, SHIFT + 1, (), generator=g))
                level = 0.1 * torch.rand((len(rows), 1, 1, 1), generator=g)
                noisy = x[rows] + level * torch.randn(x[rows].shape, generator=g)
                seen = torch.where(heard[rows], noisy, -1.0).roll(shift, 3)
                yield F.cross_entropy(net(seen), labels[rows])

    train_one_cycle(net, torch.optim.Adam(net.parameters(), lr=RATE), losses(), steps)
    return net.eval()
