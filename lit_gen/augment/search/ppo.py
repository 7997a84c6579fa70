"""Proximal policy optimisation of the controller, AutoAugment's search method
(https://arxiv.org/abs/1805.09501, Appendix; PPO: https://arxiv.org/abs/1707.06347, Eq. 7)."""

from collections.abc import Sequence

import torch

from lit_gen import rng
from lit_gen.augment.search.controller import Controller
from lit_gen.augment.search.space import Choices, Space

__all__ = ["PPO"]


class PPO:
    """Samples `batch` policies, then takes `epochs` steps on the clipped surrogate.

    The advantage is the reward over an exponential moving average of rewards (`baseline` its decay), in units
    of the batch's standard deviation; `entropy` weighs the entropy bonus. Learning rate 3.5e-4 is the
    papers', for 15,000 samples and more.
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
        entropy: float = 1e-5,
        baseline: float = 0.95,
        hidden: int = 100,
    ):
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
        if self.mean is None:
            self.mean = float(r.mean())
        advantage = (r - self.mean) / (r.std(correction=0) + 1e-6)
        self.mean = self.decay * self.mean + (1 - self.decay) * float(r.mean())
        with torch.no_grad():
            old, _ = self.controller.evaluate(choices)
        for _ in range(self.epochs):
            log_p, entropy = self.controller.evaluate(choices)
            ratio = (log_p - old).exp()
            a = advantage[:, None]
            surrogate = torch.minimum(ratio * a, ratio.clamp(1 - self.clip, 1 + self.clip) * a)
            loss = -(surrogate + self.entropy * entropy).sum(1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
