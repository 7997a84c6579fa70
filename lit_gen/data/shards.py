"""Writes what `lit_gen.data.prepared` reads, a data set in litdata's chunks, or one as a zip of PNGs."""

import io
import json
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from torch import Tensor

from lit_gen.data.images import pixels_of
from lit_gen.data.prepared import (
    DESCRIPTION,
    FORMAT,
    JOURNAL,
    checksum,
    connect,
    is_remote,
    records_begin,
)
from lit_gen.errors import ConfigError

LARGEST_MIB = 2048  # places in a chunk are 32 bits
PNGS = 256  # encoded at once
NOTED_EVERY = 5  # seconds of work that a process that is killed has to do again
Entry = tuple[str, int, str]  # a file's name, bytes, and checksum
Bar = Callable[[Iterator[Any], int], Iterator[Any]]


def write_shards(dataset: Any, out: str, *, workers: int, shard_mib: float, bar: Bar) -> bool:
    """Writes the data set to the folder or URL `out`, shards of about `shard_mib` MiB on each of `workers`
    processes (0: on this one); `bar(results, total)` passes results through and shows them.

    Every entry of an item is stored as it is, in its dtype and shape, which all items must share. What an
    interrupted call has written is checked and kept by the next one. False: all of it was there. Raises
    ConfigError where `out` holds something else, and for items that differ.
    """
    if not 0 < shard_mib <= LARGEST_MIB:
        raise ConfigError(f"shard_mib={shard_mib}: must lie above 0 and be at most {LARGEST_MIB}.")
    target = _Target(out)
    shards, pixels = _Shards(dataset, target, shard_mib), pixels_of(dataset)
    source = {"data": dataset.fingerprint(), "shard_size": shards.shard_size, "fields": shards.fields}
    entries = target.begin(source)
    if entries is None:
        return False
    missing = [n for n in range(shards.count) if n not in entries]
    noted = time.monotonic()
    try:
        for number, entry in bar(_in_processes(shards, missing, workers), len(missing)):
            entries[number] = entry
            if time.monotonic() - noted > NOTED_EVERY:
                target.write(JOURNAL, [source, *entries.items()])
                noted = time.monotonic()
    finally:
        target.write(JOURNAL, [source, *entries.items()])
    described = {
        "format": FORMAT,
        "source": source,
        "size": len(dataset),
        "shard_size": shards.shard_size,
        "record": shards.record,
        "fields": shards.fields,
        "shards": [entries[n] for n in range(shards.count)],
        "labels": [] if dataset.labels is None else [shards.write_labels()],
        "classes": list(dataset.classes),
        "pixels": {"dtype": pixels.dtype, "range": pixels.range, "shown": pixels.shown},
    }
    target.write("index.json", shards.litdata_index(described["shards"]))
    target.write(DESCRIPTION, described)  # last: it says that all is there
    target.remove(JOURNAL)
    return True


def write_zip(dataset: Any, path: Path, *, workers: int, bar: Bar) -> None:
    """Writes uint8 images of 1 or 3 channels and their labels as a zip in the layout of EDM's and StyleGAN's
    data-set tools, which `lit_gen.data.folders.ImageFiles` reads. Raises ConfigError for other data."""
    if path.exists():
        raise ConfigError(f"{path} exists: choose another out=.")
    first = _arrays(dataset[0])
    of_bytes = pixels_of(dataset).are_bytes and len(first["image"]) in (1, 3)
    if not of_bytes or set(first) != {"image", "label"}:
        raise ConfigError(
            f"format=zip holds uint8 images of 1 or 3 channels and class labels; the data have "
            f"{_words(first)}. Take format=litdata."
        )
    pngs, part = _Pngs(dataset), path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    labels: list[tuple[str, int]] = []
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for _, block in bar(_in_processes(pngs, list(range(pngs.count)), workers), pngs.count):
            for png, label in block:
                name = f"{len(labels) // 1000:05}/img{len(labels):08}.png"
                archive.writestr(name, png)
                labels.append((name, label))
        described = {"labels": None if dataset.labels is None else labels, "classes": list(dataset.classes)}
        archive.writestr("dataset.json", json.dumps(described))
    part.replace(path)


def put_files(folder: Path, out: str) -> None:
    """Moves the files of a folder to the folder or URL `out`, each whole, in the order of their names."""
    target = _Target(out)
    if not target.remote:
        Path(target.out).mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        with target.temporary() as near:  # of one file system, so that it can be renamed
            target.put(Path(shutil.move(path, near)), path.name)


class _Task(Protocol):
    """Work in numbered pieces, done in any process."""

    count: int

    def write(self, number: int) -> Any: ...


class _Shards:
    """A data set as litdata's chunks, every record of the first one's layout."""

    def __init__(self, dataset: Any, target: "_Target", shard_mib: float):
        self.dataset, self.target = dataset, target
        self._like = _arrays(dataset[0])
        with tempfile.TemporaryDirectory() as folder:
            chunk, self._index = _write_chunk(Path(folder), [self._like])
            record = chunk.read_bytes()[records_begin(1) :]
        self.record, self.fields = len(record), _layout(record, self._like)
        self.shard_size = min(max(int(shard_mib * 2**20) // self.record, 1), len(dataset))
        self.count = -(-len(dataset) // self.shard_size)

    def write(self, number: int) -> Entry:
        """Shard `number`, put where it belongs."""
        begin = number * self.shard_size
        rows = range(begin, min(begin + self.shard_size, len(self.dataset)))
        with self.target.temporary() as folder:
            chunk, _ = _write_chunk(Path(folder), [self._item(i) for i in rows])
            assert chunk.stat().st_size == records_begin(len(rows)) + len(rows) * self.record
            return self.target.put(chunk, f"chunk-0-{number}.bin")

    def _item(self, i: int) -> dict[str, np.ndarray]:
        item = _arrays(self.dataset[i])
        pixels_of(self.dataset).check(torch.as_tensor(item["image"]), f"image {i} of the data")
        if _words(item) != _words(self._like):
            raise ConfigError(
                f"Image {i} of the data has {_words(item)}, where the first has {_words(self._like)}: a "
                "prepared set holds items of one format. Set data.image_size, or leave it out."
            )
        return item

    def write_labels(self) -> Entry:
        with self.target.temporary() as folder:
            path = Path(folder, "labels.npy")
            np.save(path, np.asarray(self.dataset.labels, np.int64))
            return self.target.put(path, path.name)

    def litdata_index(self, entries: list[Entry]) -> dict[str, Any]:
        """What litdata's own reader wants to know."""
        full, rest = divmod(len(self.dataset), self.shard_size)
        sizes = [self.shard_size] * full + [rest] * (rest > 0)
        chunks = [
            {"filename": name, "chunk_bytes": size, "chunk_size": count, "dim": None}
            for (name, size, _), count in zip(entries, sizes, strict=True)
        ]
        return {"chunks": chunks, "config": self._index["config"] | {"chunk_size": self.shard_size}}


class _Pngs:
    """A data set's images as PNGs, by blocks."""

    def __init__(self, dataset: Any):
        self.dataset, self.count = dataset, -(-len(dataset) // PNGS)

    def write(self, number: int) -> list[tuple[bytes, int]]:
        rows = range(number * PNGS, min((number + 1) * PNGS, len(self.dataset)))
        return [(_png(item["image"]), int(item["label"])) for item in map(self.dataset.__getitem__, rows)]


class _Target:
    """A folder or a URL where files are put whole."""

    def __init__(self, out: str):
        self.out, self.remote = out.rstrip("/"), is_remote(out)

    def begin(self, source: dict[str, Any]) -> dict[int, Entry] | None:
        """What an earlier call has written of the same source, by number and checked; None where that is all.
        Raises ConfigError where there is anything else."""
        try:
            names = self._names()
        except Exception as error:  # every storage has its own
            raise ConfigError(f"out={self.out}: cannot be reached or made ({error}).") from error
        if not names:
            self.write(JOURNAL, [source])
            return {}
        begun, entries = None, []
        if DESCRIPTION in names:
            begun = self._read(DESCRIPTION).get("source")
        elif JOURNAL in names:
            begun, *entries = self._read(JOURNAL)
        if begun != source:
            raise ConfigError(
                f"{self.out} holds something else ({min(names)}), or these data prepared with another "
                "shard_mib: choose another out=."
            )
        if DESCRIPTION in names:
            return None
        return {number: tuple(entry) for number, entry in entries if self._holds(*entry)}

    def _read(self, name: str) -> Any:
        system, root = connect(self.out)
        return json.loads(system.cat_file(f"{root}/{name}"))

    def _names(self) -> set[str]:
        system, root = connect(self.out)
        if isinstance(system, LocalFileSystem):  # others have no folders, and would make a bucket
            system.makedirs(root, exist_ok=True)
        try:
            names = {str(name).rpartition("/")[2] for name in system.ls(root, detail=False)}
        except FileNotFoundError:
            return set()
        for left in {name for name in names if name.startswith(".part-")}:  # by a call that was killed
            shutil.rmtree(Path(self.out, left))
            names.remove(left)
        return names

    def _holds(self, name: str, size: int, digest: str) -> bool:
        system, root = connect(self.out)
        if not system.exists(f"{root}/{name}") or system.size(f"{root}/{name}") != size:
            return False
        return self.remote or checksum(Path(self.out, name)) == digest

    def temporary(self) -> tempfile.TemporaryDirectory:
        """A folder from which `put` moves files."""
        if self.remote:
            return tempfile.TemporaryDirectory()
        return tempfile.TemporaryDirectory(dir=self.out, prefix=".part-")

    def put(self, path: Path, name: str) -> Entry:
        entry = name, path.stat().st_size, checksum(path)
        if self.remote:
            system, root = connect(self.out)
            system.put_file(str(path), f"{root}/{name}")
        else:
            path.replace(Path(self.out, name))
        return entry

    def write(self, name: str, content: Any) -> None:
        with self.temporary() as folder:
            path = Path(folder, name)
            path.write_text(json.dumps(content))
            self.put(path, name)

    def remove(self, name: str) -> None:
        system, root = connect(self.out)
        system.rm_file(f"{root}/{name}")


def _write_chunk(folder: Path, items: list[dict[str, np.ndarray]]) -> tuple[Path, dict[str, Any]]:
    """(the chunk's file, litdata's index of it)"""
    try:
        from litdata.streaming import Cache
    except ImportError as error:
        raise ConfigError("format=litdata needs litdata: pip install 'lit-gen[prepare]'.") from error
    cache = Cache(str(folder), chunk_size=len(items))
    for i, item in enumerate(items):
        cache[i] = {name: np.atleast_1d(value) for name, value in item.items()}  # it pickles what has no axis
    cache.done()
    (index,) = folder.glob("*.index.json")
    described = json.loads(index.read_text())
    return folder / described["chunks"][0]["filename"], described


def _layout(record: bytes, item: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Where the arrays of a record lie: their sizes come first, uint32 each, then each behind its header."""
    sizes = np.frombuffer(record, np.uint32, len(item))
    ends = sizes.nbytes + np.cumsum(sizes)
    fields = {}
    for (name, value), end in zip(item.items(), ends.tolist(), strict=True):
        assert record[end - value.nbytes : end] == value.tobytes(), name
        fields[name] = {"dtype": value.dtype.str, "shape": list(value.shape), "offset": end - value.nbytes}
    return fields


def _arrays(item: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: v.numpy() if isinstance(v, Tensor) else np.asarray(v) for name, v in item.items()}


def _words(item: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in item.items())


def _png(image: Tensor) -> bytes:
    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


_task: _Task | None = None  # of a worker process


def _in_processes(task: _Task, numbers: list[int], workers: int) -> Iterator[tuple[int, Any]]:
    """(number, what it gives), in order, computed ahead by at most as many processes as there is work for."""
    if min(workers, len(numbers)) < 1:
        yield from ((n, task.write(n)) for n in numbers)
        return
    with ProcessPoolExecutor(min(workers, len(numbers)), initializer=_hold, initargs=(task,)) as pool:
        yield from zip(numbers, pool.map(_write, numbers), strict=True)


def _hold(task: _Task) -> None:
    global _task
    _task = task
    torch.set_num_threads(1)


def _write(number: int) -> Any:
    assert _task is not None
    return _task.write(number)
