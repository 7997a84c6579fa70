"""The controller: an LSTM that writes a policy choice by choice (https://arxiv.org/abs/1805.09501, Section
3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Controller(nn.Module):
    """One LSTM layer of `hidden` units over T steps; step i is a softmax over `sizes[i]` values.

    Steps of one size and role share their softmax and embedding, `period` being the length of a role cycle
    (3: op, probability, level). Every step sees the choice before it.
    """

    def __init__(self, sizes: Sequence[int], hidden: int = 100, period: int = 3):
        super().__init__()
        self.sizes, self.period = tuple(sizes), min(period, len(sizes))
        roles = self.sizes[: self.period]
        if (
            roles * (len(self.sizes) // self.period) != self.sizes
        ):  # no cycle: every step is a role of its own
            roles, self.period = self.sizes, len(self.sizes)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.start = nn.Parameter(torch.zeros(hidden))
        self.embeddings = nn.ModuleList(nn.Embedding(size, hidden) for size in roles)
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in roles)
        for p in self.parameters():
            nn.init.uniform_(p, -0.1, 0.1)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """int64 (n, T), drawn by the Gumbel trick."""
        x, state, steps = self.start.expand(n, 1, -1), None, []
        for i in range(len(self.sizes)):
            role = i % self.period
            out, state = self.lstm(x, state)
            logits = self.heads[role](out[:, 0])
            uniform = torch.rand(logits.shape, generator=generator).clamp_(min=1e-20)
            steps.append((logits - (-uniform.log()).log()).argmax(-1))
            x = self.embeddings[role](steps[-1])[:, None]
        return torch.stack(steps, 1)

    def evaluate(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies), (n, T) each, of rows of choices (n, T)."""
        n, t = choices.shape
        by_role = choices.view(n, t // self.period, self.period).unbind(2)
        before = [embed(role) for embed, role in zip(self.embeddings, by_role, strict=True)]
        before = torch.stack(before, 2).flatten(1, 2)[:, :-1]
        out, _ = self.lstm(torch.cat([self.start.expand(n, 1, -1), before], 1))
        out = out.view(n, t // self.period, self.period, -1).unbind(2)
        log_p, entropy = [], []
        for head, x, chosen in zip(self.heads, out, by_role, strict=True):
            step = head(x).log_softmax(-1)
            log_p.append(step.gather(2, chosen[..., None])[..., 0])
            entropy.append(-(step.exp() * step).sum(-1))
        return torch.stack(log_p, 2).flatten(1), torch.stack(entropy, 2).flatten(1)
