"""What the arms with a generator share: keys, initial weights, and trained networks that are kept.

Arms that use one generator in several ways train it once: its weights are in $LITGEN_CACHE/generators under
a key of all that they depend on. What the training took is kept beside them, and counts wherever they are
used.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_gen.comparison.task import seconds
from lit_gen.errors import ConfigError
from lit_gen.images import grid
from lit_gen.metrics.reference import cache_folder, load_tensors, save_tensors
from lit_gen.rng import key
from lit_gen.search import Labelled

__all__: list[str] = []
log = logging.getLogger(__name__)

NO_OTHER = "other classes or typefaces, and this data has none: leave the arm out."
FORMAT = 2  # of the trainings: another number where the same options give other weights


def digest(data: Labelled) -> str:
    """Of images and labels: 16 hexadecimal digits."""
    content = hashlib.blake2b(repr(tuple(data.images.shape)).encode(), digest_size=8)
    for part in (data.images, data.labels):
        content.update(part.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


@contextmanager
def random_numbers(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Initial weights and dropout are drawn by the key of `parts` inside, and the global generators are
    afterwards as before."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(key(*parts))
        yield


def trained(
    network: nn.Module, train: Callable[[], None], device: torch.device, *depends: int | str
) -> tuple[float, float]:
    """The network's weights as `train()` leaves them, on the device, from the cache if they are there:
    (seconds that the training took, or of these 0 here, those spent before). `depends` says all that the
    weights depend on."""
    parts = [FORMAT, type(network).__name__, torch.__version__, device.type, *depends]
    path = cache_folder() / "generators" / f"{key(*parts):016x}.safetensors"
    known = {"parts": [str(part) for part in parts]}
    kept = load_tensors(path, known)
    if kept is None:
        start = seconds(device)
        train()
        spent = seconds(device) - start
        try:
            save_tensors(path, known, network.state_dict() | {"seconds": torch.tensor([spent])})
        except OSError as error:
            log.warning("%s could not be kept (%s); who needs it next trains it again.", path, error)
        return spent, 0.0
    spent = float(kept.pop("seconds"))
    network.load_state_dict(kept)
    return 0.0, spent


def in_turn(labels: Tensor, classes: int, count: int) -> Tensor:
    """Rows of images with the labels 0, 1, ... classes - 1, `count` times: those of a class in turn.
    `labels` is int64 (N,)."""
    members = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    if empty := [c for c, rows in enumerate(members) if not len(rows)]:
        raise ConfigError(f"Class {empty[0]} has no labelled image.")
    return torch.stack([rows.repeat(-(-count // len(rows)))[:count] for rows in members], 1).flatten()


def sheet(train: Labelled, made: Labelled, columns: tuple[int, int] = (4, 12)) -> Tensor:
    """A picture uint8 (3, H', W'), a row for each class of which images were made: its first labelled images,
    and its first made ones, over again where there are fewer; `columns` of each."""
    rows = []
    for label in made.labels.unique():
        both = [data.images[data.labels == label] for data in (train, made)]
        if len(both[0]):
            some = [x[torch.arange(n, device=x.device) % len(x)] for x, n in zip(both, columns, strict=True)]
            rows += [some[0], torch.full_like(both[0][:1], 128), some[1]]
    return grid(torch.cat(rows), sum(columns) + 1, scale=2)
