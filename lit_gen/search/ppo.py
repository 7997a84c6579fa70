"""Proximal policy optimization of the controller, AutoAugment's search method
(https://arxiv.org/abs/1805.09501, Appendix; PPO: https://arxiv.org/abs/1707.06347, Eq. 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_gen import rng
from lit_gen.errors import ConfigError
from lit_gen.search.controller import Controller
from lit_gen.search.space import Choices, Space

__all__ = ["PPO"]


class PPO:
    """Samples `batch` policies, then takes `epochs` steps on the clipped surrogate.

    The advantage is the reward over the batch's mean, in units of the batch's standard deviation; `entropy`
    weighs the entropy bonus against it. The papers' settings are `entropy=1e-5, baseline=0.95`, the decay of
    an exponential moving average of earlier rewards that takes the mean's place, and learning rate 3.5e-4,
    for 15,000 samples and more. While rewards rise such an average lags: nearly all of a batch lies above it,
    by several deviations, whatever was drawn becomes more probable, and without a bonus the controller
    settles on a neighbor of the best choice. Raises ConfigError for a batch of one, which has no deviation.
    """

    def __init__(
        self,
        space: Space,
        seed: int = 0,
        *,
        batch: int = 10,
        learning_rate: float = 3.5e-4,
        clip: float = 0.2,
        epochs: int = 4,
        entropy: float = 0.05,
        baseline: float | None = None,
        hidden: int = 100,
    ):
        if batch < 2:
            raise ConfigError(
                f"PPO: batch={batch}; policies are compared with others of their batch, give 2 or more."
            )
        self.batch, self.clip, self.epochs, self.entropy, self.decay = batch, clip, epochs, entropy, baseline
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(seed, "search", "controller") % 2**63)
            self.controller = Controller(space.sizes, hidden)
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=learning_rate)
        self.generator = rng.keyed_generator(seed, "search", "ppo")
        self.mean: float | None = None

    def ask(self) -> list[Choices]:
        return [tuple(row) for row in self.controller.sample(self.batch, self.generator).tolist()]

    def tell(self, rows: Sequence[Choices], rewards: Sequence[float]) -> None:
        choices, r = torch.tensor(rows), torch.tensor(rewards, dtype=torch.float32)
        now = float(r.mean())
        if self.mean is None or self.decay is None:
            self.mean = now
        advantage = (r - self.mean) / (r.std(correction=0) + 1e-6)
        if self.decay is not None:
            self.mean = self.decay * self.mean + (1 - self.decay) * now
        old: Tensor | None = None
        for _ in range(self.epochs):
            log_p, entropy = self.controller.evaluate(choices)
            old = log_p.detach() if old is None else old
            ratio = (log_p - old).exp()
            a = advantage[:, None]
            surrogate = torch.minimum(ratio * a, ratio.clamp(1 - self.clip, 1 + self.clip) * a)
            loss = -(surrogate + self.entropy * entropy).sum(1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
