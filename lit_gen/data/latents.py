"""Latents as a data set: what an autoencoder makes of each image, from which an epoch draws anew."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_gen.data.images import pixels_of, rows_of
from lit_gen.data.keyed import KeyedDataset
from lit_gen.data.module import ImageDataModule, as_it_is
from lit_gen.data.prepared import PreparedImages
from lit_gen.data.shards import Bar
from lit_gen.data.transforms import stacked
from lit_gen.errors import ConfigError
from lit_gen.images import Pixels

STORED = {"float32": torch.float32, "float16": torch.float16}


class Scale(Protocol):
    """Latents (..., C, h, w) as a score model sees them; `check_latents` raises ConfigError where those in a
    folder or URL are of another kind."""

    def normalized(self, latents: Tensor) -> Tensor: ...

    def check_latents(self, folder: str) -> None: ...


class LatentDraw:
    """Moments (2 C, h, w), the means over the standard deviations -> a latent (C, h, w), drawn by the
    generator and normalized by the codec; see `lit_gen.data.transforms`."""

    def __init__(self, codec: Scale):
        self.codec = codec

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, deviation = image.to(torch.float32).chunk(2)
        return self.codec.normalized(mean + deviation * torch.randn(mean.shape, generator=generator))

    def batch(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """`__call__` of each image, (B, 2 C, h, w) -> (B, C, h, w)."""
        mean, deviation = images.to(torch.float32).chunk(2, 1)
        noise = torch.empty_like(mean, memory_format=torch.contiguous_format)
        for row, generator in zip(noise.unbind(0), generators, strict=True):
            row.normal_(generator=generator)
        return self.codec.normalized(mean + deviation * noise)


class LatentDataModule(ImageDataModule):
    """Latents that `lit-gen prepare encoder=...` has written: {"image": float32 (B, C, h, w), drawn by
    (seed, epoch, index) and normalized by `codec`, "label", "index", and what else was prepared}.

    `train` and `test` are what the latents were made of, which samples are measured against: prepared
    sets; None where there are none. `image_size` and `channels` are those of the latents; `dtype`, `range`,
    and `shown` are of the pictures. `latents(split)` has the stored moments (N, 2 C, h, w).
    """

    def __init__(
        self,
        latents: dict[str, Callable[[], PreparedImages]],
        codec: Scale,
        train: Callable[[], Any] | None,
        test: Callable[[], Any] | None,
        **options: Any,
    ):
        if options.get("augment") is not None:
            raise ConfigError("data.augment changes pictures, not latents: leave it out.")
        if options.get("condition"):
            raise ConfigError(
                "data.condition: latents come with the conditions that their pictures had: give "
                "data.condition.* to lit-gen prepare."
            )
        super().__init__(train, test, **options)
        self.codec, self._moments, self._opened = codec, latents, {}
        self.has_pictures = train is not None and test is not None

    def latents(self, split: str) -> PreparedImages:
        """The "train" or "test" moments. Raises ConfigError where pictures of another number are beside
        them."""
        if split not in self._opened:
            found = self._moments[split]()
            if self.has_pictures and (n := len(self.dataset(split))) != len(found):
                raise ConfigError(f"data.images has {n} {split} images, and there are {len(found)} latents.")
            self._opened[split] = found
        return self._opened[split]

    def prepare_data(self) -> None:
        for split in self._moments:
            self.latents(split)

    def make(self, split: str) -> dict[str, Any]:
        if not self.has_pictures:
            raise ConfigError(
                "data.images=null: without pictures nothing can be measured against them. Leave the "
                "measurement out (metrics=none), or give data.images=<their prepared set>."
            )
        return super().make(split)

    @property
    def train(self) -> Any:
        return self.dataset("train") if self.has_pictures else self.latents("train")

    @property
    def test(self) -> Any:
        return self.dataset("test") if self.has_pictures else self.latents("test")

    def keyed_train(self) -> KeyedDataset:
        return self.keyed(self.latents("train"), LatentDraw(self.codec), self.seed)

    def keyed_test(self) -> KeyedDataset:
        return self.keyed(self.latents("test"), LatentDraw(self.codec), self.seed)

    def check_pixels(self, split: str) -> None:
        if self.has_pictures:
            super().check_pixels(split)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        others = {name: x for name, x in batch.items() if name != "image"}
        return super().on_after_batch_transfer(others, dataloader_idx) | {"image": batch["image"]}

    def _at(self, split: str, indices: Sequence[int]) -> dict[str, Tensor]:
        keyed = self.keyed_train() if split == "train" else self.keyed_test()
        return self.on_after_batch_transfer(keyed.read([(0, int(i)) for i in indices]), 0)


def data_module(
    path: str,
    codec: Scale,
    images: str | None,
    window: int | None = None,
    cache: str | None = None,
    cache_gib: float = 32,
    **options: Any,
) -> LatentDataModule:
    """The `LatentDataModule` of the sets `train` and `test` in `path`, and of the pictures in the sets of the
    same names in `images`; `options` are its other arguments. It raises ConfigError for latents that `codec`
    is not of."""
    stored = partial(PreparedImages, window=window, cache=cache, cache_gib=cache_gib)

    def sets(root: str) -> dict[str, Callable[[], PreparedImages]]:
        return {split: partial(stored, f"{root.rstrip('/')}/{split}") for split in ("train", "test")}

    pictures: dict[str, Any] = {"train": None, "test": None} if images is None else sets(str(images))
    latents = {split: partial(_checked, made, codec, str(path)) for split, made in sets(str(path)).items()}
    return LatentDataModule(latents, codec, **pictures, **options)


def _checked(latents: Callable[[], PreparedImages], codec: Scale, path: str) -> PreparedImages:
    codec.check_latents(path)
    return latents()


class EncodedImages:
    """A data set of what `encode` makes of the images of another: `ds[i] -> {"image": (2 C, h, w), the means
    over the standard deviations, ...}`, for `lit_gen.data.shards.write_shards`.

    `encode(float32 (B, C, H, W) in [-1, 1]) -> (B, 2 C, h, w)` is called with blocks of `batch_size` images,
    always the same, so that an image has the same latents whoever asks. Blocks that follow one another are
    read ahead by `workers` processes. `dtype` is float32 or float16; `name` tells encoders apart.
    """

    on_disk = True

    def __init__(
        self,
        dataset: Any,
        encode: Callable[[Tensor], Tensor],
        name: str,
        dtype: str = "float32",
        batch_size: int = 64,
        workers: int = 0,
    ):
        if dtype not in STORED:
            raise ConfigError(f"dtype={dtype}: latents are stored as {' or '.join(STORED)}.")
        self.dataset, self.encode, self.name = dataset, encode, name
        self.batch_size, self.workers = batch_size, workers
        self.labels, self.classes = dataset.labels, dataset.classes
        self.pixels = Pixels(dtype, (-1, 1), bounded=False)
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._blocks: Iterator[dict[str, Tensor]] = iter(())
        self._next = -1  # the block that `_blocks` gives next

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        number, row = divmod(i, self.batch_size)
        if self._block[0] != number:
            self._block = number, self._encoded(number)
        return self._block[1][row]

    def fingerprint(self) -> str:
        return f"{self.dataset.fingerprint()}-{self.name}-{self.pixels.dtype}"

    def _encoded(self, number: int) -> list[dict[str, Any]]:
        if self._next != number:
            self._blocks, self._next = self._from(number), number
        batch = next(self._blocks)
        self._next += 1
        moments = self.encode(pixels_of(self.dataset).to_model(batch.pop("image")))
        batch = {name: x for name, x in batch.items() if name != "index"}
        batch["image"] = moments.to(self.pixels.torch_dtype).cpu()
        rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        return [row | {"label": int(row["label"])} for row in rows]

    def _from(self, number: int) -> Iterator[dict[str, Tensor]]:
        keys = [(0, i) for i in range(number * self.batch_size, len(self))]
        blocks = [keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)]
        return iter(
            DataLoader(
                KeyedDataset(self.dataset),  # pyright: ignore[reportArgumentType] a map-style set
                batch_sampler=blocks,
                num_workers=self.workers,
                collate_fn=as_it_is,
            )
        )


def latent_statistics(dataset: Any, batch_size: int = 1024, bar: Bar | None = None) -> dict[str, list[float]]:
    """{"mean", "std"} by channel, (C,) each, over all latents that could be drawn from the moments of a data
    set: the variance is that of the means and the mean of the variances. `bar` shows the batches."""
    count, sums, squares = 0, 0.0, 0.0
    starts = range(0, len(dataset), batch_size)
    for start in starts if bar is None else bar(iter(starts), len(starts)):
        rows = range(start, min(start + batch_size, len(dataset)))
        moments = stacked(rows_of(dataset, rows)["image"]).to(torch.float64).numpy()
        mean, deviation = np.split(moments, 2, axis=1)
        count += mean.size // mean.shape[1]
        sums = sums + mean.sum((0, 2, 3))
        squares = squares + (mean**2 + deviation**2).sum((0, 2, 3))
    mean = np.asarray(sums) / count
    std = np.sqrt(np.asarray(squares) / count - mean**2)
    return {"mean": mean.tolist(), "std": std.tolist()}
