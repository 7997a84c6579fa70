"""PreparedImages: a data set that `lit-gen prepare` has written, read by index from local or remote shards.

A prepared set is a folder of litdata's chunks (https://github.com/Lightning-AI/litData), each of `shard_size`
records but the last, and `prepared.json`. Every record has the same bytes in the same places, so that image i
is one read at a known place of a known file. litdata's own reader streams the folder too; by random index it
maps a chunk anew for each image (docs/benchmarks.md).
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from filelock import FileLock
from fsspec.core import url_to_fs
from torch import Tensor

from lit_gen.data.images import fingerprint
from lit_gen.data.keyed import permuted
from lit_gen.errors import ConfigError
from lit_gen.images import Pixels
from lit_gen.rng import Permutation

DESCRIPTION, JOURNAL = "prepared.json", "prepare.jsonl"
FORMAT = 1
OPEN_FILES = 256
TRIES = 3


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is a URL."""
    return "://" in str(path)


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path in it. Raises ConfigError where its client is not installed."""
    try:
        return url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    except (ImportError, ValueError) as error:  # no s3fs, or no such protocol
        raise ConfigError(
            f"{url}: cannot be opened ({error}). pip install 'lit-gen[s3]' for S3, or the client of "
            "fsspec for other storage."
        ) from error


def checksum(path: Path) -> str:
    """BLAKE2b of the file, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def records_begin(count: int) -> int:
    """Where the records of a chunk begin: behind their number and the places of all and of the end, uint32
    each."""
    return 4 * (count + 2)


class PreparedImages:
    """`ds[i] -> {"image": (C, H, W), "label": int, ...}` and `ds.batch(indices)`, the same with a batch axis,
    in the dtypes that were prepared; see `lit_gen.data.images`.

    `path` is a folder, or a URL that fsspec opens (s3://bucket/folder, with the package s3fs), whose shards
    are fetched when they are needed into `cache` (by default a folder in ~/.cache/lit_gen, or in
    $XDG_CACHE_HOME), checked, and removed again, the longest unused first, where they are together more than
    `cache_gib`. Processes of a machine share them.

    Local images are read in random order, remote ones in the order of `Windows` with `window` shards (default
    8), for which `cache_gib` has to hold three windows; `window` of a local set reads it in this order too.

    Raises ConfigError for what is no prepared set, or not all of one.
    """

    on_disk = True

    def __init__(
        self,
        path: str | os.PathLike,
        window: int | None = None,
        cache: str | os.PathLike | None = None,
        cache_gib: float = 32,
    ):
        self.path = str(path)
        remote = _Remote(self.path, cache, cache_gib) if is_remote(path) else None
        self._described = described = _described(self.path, remote)
        self._shards: list[tuple[str, int, str]] = [tuple(row) for row in described["shards"]]
        self._size, self._shard_size = described["size"], described["shard_size"]
        self._fields = {name: (np.dtype(f["dtype"]), f["shape"]) for name, f in described["fields"].items()}
        self._record = np.dtype(
            {
                "names": list(self._fields),
                "formats": [(dtype, tuple(shape)) for dtype, shape in self._fields.values()],
                "offsets": [f["offset"] for f in described["fields"].values()],
                "itemsize": described["record"],
            }
        )
        self._remote = remote
        self._files: dict[int, FileIO] = {}
        self.classes: list[str] = described["classes"]
        self.pixels, self.shape = Pixels(**described["pixels"]), tuple(self._fields["image"][1])
        if remote is None:
            _check_files(Path(self.path), [*self._shards, *described["labels"]])
        else:
            remote.use(self.fingerprint())
        self.labels: Tensor | None = None
        for row in described["labels"]:  # none or one; mapped, a page at a time
            self.labels = torch.from_numpy(np.load(self._local(tuple(row)), mmap_mode="c"))
        if window is None and remote is not None:
            window = 8
        if window is not None and window < 1:
            raise ConfigError(f"data.window={window}: must be at least 1 shard.")
        if remote is not None and window is not None:
            remote.check_room(3 * window * max(size for _, size, _ in self._shards))
        ahead = None if remote is None else self._fetch_ahead
        self.order = permuted if window is None else Windows(self._shard_size, window, ahead)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self._size:
            raise IndexError(i)  # ends a loop over the set
        item: dict[str, Any] = {name: value[0] for name, value in self.batch([i]).items()}
        return item | {"label": int(item["label"])}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Records at once: {"image": (B, C, H, W), "label": int64 (B,), ...}."""
        records = np.empty(len(indices), self._record)
        everything, length = records.view(np.uint8).data, self._record.itemsize
        for row, i in enumerate(indices):
            self._read(int(i), everything[row * length : (row + 1) * length])
        return {name: torch.from_numpy(records[name].copy()) for name in self._fields}

    def fingerprint(self) -> str:
        """A name that changes with the content, made of the shards' checksums."""
        return fingerprint("prepared", self._size, [json.dumps([self._shards, self.classes]).encode()])

    def _read(self, i: int, into: memoryview) -> None:
        shard, row = divmod(i, self._shard_size)
        count = min(self._shard_size, self._size - shard * self._shard_size)
        begin = records_begin(count) + row * self._record.itemsize
        # Not mapped: a file that is cut off while it is mapped kills the process, and its pages would count.
        if os.preadv(self._file(shard), [into], begin) != len(into):
            name, size, _ = self._shards[shard]
            raise ConfigError(f"{self.path}/{name}: ends before its {size} bytes. Copy it again.")

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = self._opened(shard)
        return self._files[shard].fileno()

    def _opened(self, shard: int) -> FileIO:
        for _ in range(TRIES):  # another process may make room between the two
            path = self._local(self._shards[shard])
            try:
                return FileIO(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
        raise ConfigError(f"{self.path}/{self._shards[shard][0]} was removed while it was read.")

    def _local(self, entry: tuple[str, int, str]) -> Path:
        return Path(self.path, entry[0]) if self._remote is None else self._remote.fetch(*entry)

    def _fetch_ahead(self, shards: list[int]) -> None:
        assert self._remote is not None
        for shard in shards:
            self._remote.fetch(*self._shards[shard])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}


def data_module(
    path: str,
    window: int | None = None,
    cache: str | None = None,
    cache_gib: float = 32,
    **options: Any,
) -> Any:
    """The `ImageDataModule` of a prepared training and test set, in the folders `train` and `test` of `path`;
    `options` are its other arguments."""
    from lit_gen.data.module import ImageDataModule  # Lightning takes seconds, and workers do without it

    sets = {
        split: partial(
            PreparedImages,
            f"{str(path).rstrip('/')}/{split}",
            window=window,
            cache=cache,
            cache_gib=cache_gib,
        )
        for split in ("train", "test")
    }
    return ImageDataModule(**sets, **options)


class Windows:
    """The order of an epoch in two levels: shards by a keyed permutation, and the images of each `window`
    successive shards by another. Each shard is needed in one window of an epoch alone.

    Called as a `lit_gen.data.keyed.Order`. `ahead(shards)` is called in a thread with the shards of a window
    that is read for the first time, and then with those of the next one.
    """

    def __init__(self, shard_size: int, window: int, ahead: Callable[[list[int]], None] | None = None):
        self.shard_size, self.window, self._ahead = shard_size, window, ahead
        self.at_once = window * shard_size  # of two windows at most, so that only a third is fetched ahead
        self.__name__ = f"windows of {window} shards"
        self._announced: tuple[int, int] | None = None

    def __call__(self, size: int, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
        shards = -(-size // self.shard_size)
        full, lacking = self.window * self.shard_size, shards * self.shard_size - size
        order = Permutation(shards, seed, "order", epoch)
        short = int(order.inverse(np.array(shards - 1))) // self.window  # the window with the last shard
        window = np.where(places < (short + 1) * full - lacking, places, places + lacking) // full
        within = places - window * full + lacking * (window > short)
        images = np.empty_like(places)
        for number in np.unique(window).tolist():
            members = self._members(order, number)
            count = len(members) * self.shard_size - lacking * (number == short)
            there = window == number
            at = Permutation(count, seed, "order", epoch, number)(within[there])
            images[there] = members[at // self.shard_size] * self.shard_size + at % self.shard_size
            self._announce(shards, seed, epoch, number)
        return images

    def _members(self, order: Permutation, window: int) -> np.ndarray:
        """The shards of a window, sorted: the last of all, which may be short, is its last."""
        return np.sort(order(np.arange(window * self.window, min((window + 1) * self.window, order.size))))

    def _announce(self, shards: int, seed: int, epoch: int, window: int) -> None:
        if self._ahead is None or self._announced == (epoch, window):
            return
        self._announced = (epoch, window)
        after = (epoch, window + 1) if (window + 1) * self.window < shards else (epoch + 1, 0)
        coming = [
            self._members(Permutation(shards, seed, "order", e), w) for e, w in ((epoch, window), after)
        ]
        threading.Thread(
            target=_quietly, args=(self._ahead, np.concatenate(coming).tolist()), daemon=True
        ).start()


def _quietly(ahead: Callable[[list[int]], None], shards: list[int]) -> None:
    try:
        ahead(shards)
    except Exception:  # whoever needs the shard fetches it again, and says what is wrong
        return


class _Remote:
    """Files of a remote folder, each fetched once into a folder that the processes of a machine share."""

    def __init__(self, url: str, cache: str | os.PathLike | None, gib: float):
        self.url, self._limit = url.rstrip("/"), int(gib * 2**30)
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit_gen" / "prepared"
        self.folder = home if cache is None else Path(cache)
        self._system: fsspec.AbstractFileSystem | None = None
        self._root, self._pid = "", -1

    def use(self, name: str) -> None:
        """Keeps the files in the folder `name` of the cache."""
        self.folder = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def check_room(self, needed: int) -> None:
        if self._limit < needed:
            raise ConfigError(
                f"data.cache_gib={self._limit / 2**30:g}: three windows of shards take "
                f"{needed / 2**30:.2g} GiB. Set data.cache_gib={needed / 2**30 + 0.1:.1f} or a smaller "
                "data.window."
            )

    def read(self, name: str) -> Any:
        with self._connected().open(f"{self._root}/{name}", "rb") as file:
            return file.read()

    def fetch(self, name: str, size: int, digest: str) -> Path:
        """The local copy. Raises ConfigError where the file cannot be had as it was written."""
        path = self.folder / name
        with FileLock(f"{path}.lock"):
            if path.exists():
                os.utime(path)  # used: others are removed first
            else:
                self._get(name, size, digest, path)
        return path

    def _get(self, name: str, size: int, digest: str, path: Path) -> None:
        part = path.with_name(f"{name}.part")
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(4**attempt / 4)
            try:
                self._make_room(size)
                self._connected().get_file(f"{self._root}/{name}", str(part))
            except Exception as error:  # every storage has its own
                problem = str(error) or type(error).__name__
                continue
            if part.stat().st_size == size and checksum(part) == digest:
                part.replace(path)
                return
            problem = "it is not what was prepared: its checksum differs"
        raise ConfigError(f"{self.url}/{name}: cannot be fetched in {TRIES} tries ({problem}).")

    def _make_room(self, size: int) -> None:
        kept = sorted((p.stat().st_mtime_ns, p.stat().st_size, p) for p in self.folder.glob("*.bin"))
        total = size + sum(held for _, held, _ in kept)
        for _, held, path in kept:
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= held

    def _connected(self) -> fsspec.AbstractFileSystem:
        if self._system is None or self._pid != os.getpid():  # a connection does not survive a fork
            self._system, self._root = connect(self.url)
            self._pid = os.getpid()
        return self._system

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_system": None}


def _described(path: str, remote: _Remote | None) -> dict[str, Any]:
    """`prepared.json` of a set."""
    try:
        text = Path(path, DESCRIPTION).read_bytes() if remote is None else remote.read(DESCRIPTION)
    except ConfigError:
        raise
    except Exception as error:  # every storage has its own
        raise ConfigError(_no_set(path, remote, error)) from error
    try:
        described = json.loads(text)
        if described["format"] == FORMAT:
            return described
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}/{DESCRIPTION}: damaged ({error}). Copy it again.") from error
    raise ConfigError(
        f"{path}: was prepared in format {described['format']}, and this version of lit_gen reads format "
        f"{FORMAT}."
    )


def _no_set(path: str, remote: _Remote | None, error: Exception) -> str:
    advice = "Write one with lit-gen prepare data=... out=..., or give data.path of one."
    if remote is not None:
        return f"{path}: cannot be reached, or holds no prepared set ({error}). {advice}"
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}: no such folder. {advice}"
    if (folder / JOURNAL).exists():
        return f"{path}: lit-gen prepare has not finished here. Run its command again: it goes on."
    if (folder / "index.json").exists():
        return f"{path}: a set of litdata that lit-gen prepare has not written. {advice}"
    return f"{path}: holds no prepared set ({DESCRIPTION} is missing). {advice}"


def _check_files(folder: Path, entries: Sequence[tuple[str, int, str]]) -> None:
    with os.scandir(folder) as found:
        sizes = {entry.name: entry.stat().st_size for entry in found}
    for name, size, _ in entries:
        if sizes.get(name) != size:
            has = f"has {sizes[name]}" if name in sizes else "is missing: it has"
            raise ConfigError(f"{folder / name} {has} bytes, where {size} were written. Copy it again.")
