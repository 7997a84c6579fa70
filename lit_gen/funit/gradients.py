"""The mean of a network's gradients over the processes, taken while its backward pass goes on."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

BUCKET = 25 * 2**20  # bytes of gradients that travel together, as in torch's DDP


class GradientMean:
    """Replaces a network's gradients by their means over the processes, bucket by bucket.

    Between `start()` and `finish()` a bucket sets out as soon as the backward pass has made its last
    gradient; gradients are made from the output to the input, and buckets are filled in that order. They are
    the same and leave in the same order on every process. Every process must call both, around one backward
    pass.
    """

    def __init__(self, network: nn.Module):
        weights = [p for p in reversed(list(network.parameters())) if p.requires_grad]
        ends = itertools.accumulate(p.numel() * p.element_size() for p in weights)
        places = [(end - 1) // BUCKET for end in ends]
        pairs = itertools.groupby(zip(places, weights, strict=True), key=lambda pair: pair[0])
        self.buckets = [[p for _, p in group] for _, group in pairs]
        self.bucket_of: dict[Tensor, int] = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing: list[int] | None = None  # gradients of each bucket, in a pass that is averaged
        self.next = 0
        self.under_way: list[tuple[dist.Work, Tensor, list[Tensor]]] = []
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in weights]

    def start(self) -> None:
        """From now on gradients that arrive are complete."""
        self.missing, self.next = [len(bucket) for bucket in self.buckets], 0

    def stop(self) -> None:
        """Gradients that arrive are this process's own again."""
        self.missing, self.under_way = None, []

    def _arrived(self, weight: nn.Parameter) -> None:
        if self.missing is None:
            return
        self.missing[self.bucket_of[weight]] -= 1
        while self.next < len(self.buckets) and not self.missing[self.next]:
            self._send(self.buckets[self.next])
            self.next += 1

    def _send(self, bucket: Sequence[nn.Parameter]) -> None:
        gradients = [p.grad for p in bucket if p.grad is not None]
        if gradients:
            joined = torch.cat([g.flatten() for g in gradients])
            self.under_way.append((dist.all_reduce(joined, async_op=True), joined, gradients))

    def finish(self) -> None:
        """Sends what has not been sent (a weight may have got no gradient) and puts the means in place."""
        for bucket in self.buckets[self.next :]:
            self._send(bucket)
        for work, joined, gradients in self.under_way:
            work.wait()
            parts = (joined / dist.get_world_size()).split([g.numel() for g in gradients])
            shaped = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
            torch._foreach_copy_(gradients, shaped)  # pyright: ignore[reportPrivateImportUsage] (the only such)
        self.stop()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
