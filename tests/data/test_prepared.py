"""Prepared sets: what was put in comes out by index, of local and remote shards, in an order that resumes."""

import json
import multiprocessing
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from lit_gen.data import ImageDataModule, KeyedBatches, KeyedDataset, digits
from lit_gen.data import prepared as reading
from lit_gen.data.folders import ImageFiles
from lit_gen.data.images import TensorImages
from lit_gen.data.prepared import PreparedImages, Windows, data_module
from lit_gen.data.shards import write_shards, write_zip
from lit_gen.errors import ConfigError
from lit_gen.images import Pixels

litdata = pytest.importorskip("litdata")
SMALL = 0.01  # MiB: 104 digits a shard


def through(results, total):
    return results


def write(dataset, out, workers=0, shard_mib=SMALL):
    return write_shards(dataset, str(out), workers=workers, shard_mib=shard_mib, bar=through)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "test"
    assert write(digits("test"), out, workers=2)
    return out


class Fields:
    """Images of 16 bits with a vector, a mask and a number beside them."""

    labels, classes, pixels = None, (), Pixels("uint16")

    def __init__(self, odd=None):
        self.odd = odd

    def __len__(self):
        return 50

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        size = 6 if i == self.odd else 5
        return {
            "image": torch.from_numpy(rng.integers(0, 2**16, (5, 4, size)).astype(np.uint16)),
            "label": 0,
            "vector": torch.from_numpy(rng.standard_normal(3).astype(np.float32)),
            "mask": torch.from_numpy(rng.standard_normal((1, 2, 3))),
            "age": np.float32(i / 3),
        }

    def fingerprint(self):
        return "fields"


def test_what_was_put_in_comes_out(shards):
    source, found = digits("test"), PreparedImages(shards)
    assert len(list(shards.glob("chunk-*.bin"))) == 4 and len(found) == len(source) == 360
    rows = np.random.default_rng(0).permutation(360).tolist()
    batch, expected = found.batch(rows), source.batch(rows)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[k], expected[k]) and batch[k].dtype == expected[k].dtype for k in batch)
    assert torch.equal(found.labels, source.labels) and found.classes == source.classes
    assert found[359]["label"] == source[359]["label"]
    with pytest.raises(IndexError):
        found[360]


def test_every_entry_keeps_its_dtype_and_shape(tmp_path):
    write(Fields(), tmp_path / "set", shard_mib=0.005)
    found = PreparedImages(tmp_path / "set")
    assert found.labels is None and found.pixels == Fields.pixels and found.shape == (5, 4, 5)
    assert len(list((tmp_path / "set").glob("*.bin"))) > 1
    for i in (0, 20, 49):
        item, expected = found[i], Fields()[i]
        assert item.keys() == expected.keys()
        for name in expected:
            a, b = np.asarray(item[name]), np.asarray(expected[name])
            assert a.dtype == b.dtype and np.array_equal(a, b), name


def test_litdata_reads_the_same_folder(shards):
    theirs, source = litdata.StreamingDataset(str(shards)), digits("test")
    assert len(theirs) == 360
    for i in (0, 103, 104, 359):
        item = theirs[i]
        assert np.array_equal(item["image"], source[i]["image"].numpy())
        assert item["label"].tolist() == [source[i]["label"]]


def test_workers_do_not_change_the_files(shards, tmp_path):
    """Nor does an interruption: what the first call has written is kept, what it left damaged is not."""
    out = tmp_path / "test"

    class Interrupted(TensorImages):
        def __getitem__(self, i):
            if i == 250:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    source = digits("test")
    with pytest.raises(KeyboardInterrupt):
        write(Interrupted(source.images, source.labels, source.classes, source.name), out)
    assert {p.name for p in out.glob("chunk-*")} == {"chunk-0-0.bin", "chunk-0-1.bin"}
    with pytest.raises(ConfigError, match="has not finished here"):
        PreparedImages(out)
    (out / "chunk-0-1.bin").write_bytes(b"cut off")
    kept = (out / "chunk-0-0.bin").stat().st_mtime_ns
    assert write(source, out)
    assert (out / "chunk-0-0.bin").stat().st_mtime_ns == kept
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in shards.iterdir()
    }
    assert not write(source, out)  # all of it is there


def test_a_place_that_holds_something_else_is_left_alone(shards, tmp_path):
    for other in (digits("train"), digits("test")):
        before = {p: p.stat().st_mtime_ns for p in shards.iterdir()}
        with pytest.raises(ConfigError, match="holds something else"):
            write(other, shards, shard_mib=SMALL if len(other) > 400 else 1)
        assert before == {p: p.stat().st_mtime_ns for p in shards.iterdir()}
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds something else \(thesis.tex\)"):
        write(digits("test"), tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_items_that_differ_are_refused(tmp_path, workers):
    with pytest.raises(ConfigError, match=r"Image 7 of the data has image uint16 \(5, 4, 6\)"):
        write(Fields(odd=7), tmp_path / "set", workers=workers)


def test_pixels_that_leave_their_range_are_refused(tmp_path):
    images = TensorImages(torch.full((20, 1, 2, 2), 0.5), pixels=Pixels("float32", [0, 1]))
    images.images[13, 0, 1, 1] = torch.nan
    with pytest.raises(ConfigError, match="image 13 of the data: 1 of its 4 values are NaN"):
        write(images, tmp_path / "set")


def test_a_set_is_written_to_and_read_from_other_storage(tmp_path, shards):
    """fsspec's memory stands in for a bucket."""
    url = f"memory://bucket/{tmp_path.name}"
    assert write(digits("test"), url) and not write(digits("test"), url)
    remote, local = PreparedImages(url, cache=tmp_path), PreparedImages(shards)
    assert remote.fingerprint() == local.fingerprint()
    assert torch.equal(remote.batch(range(360))["image"], local.batch(range(360))["image"])
    assert remote.order.__name__ == "windows of 8 shards" and local.order.__name__ == "permuted"


def damaged(shards, tmp_path, name, content):
    out = tmp_path / "copy"
    out.mkdir()
    for path in shards.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    if content is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(content((out / name).read_bytes()))
    return out


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("chunk-0-2.bin", lambda b: b[:-1], "chunk-0-2.bin has .* bytes, where"),
        ("chunk-0-3.bin", None, "chunk-0-3.bin is missing"),
        ("labels.npy", None, "labels.npy is missing"),
        ("prepared.json", lambda b: b[:50], "damaged"),
        ("prepared.json", lambda b: b.replace(b'"format": 1', b'"format": 9'), "in format 9"),
        ("prepared.json", None, "a set of litdata that lit-gen prepare has not written"),
    ],
)
def test_truncated_and_foreign_sets_are_refused(shards, tmp_path, name, content, says):
    with pytest.raises(ConfigError, match=says):
        PreparedImages(damaged(shards, tmp_path, name, content))


def test_what_is_no_set_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        PreparedImages(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"prepared.json is missing"):
        PreparedImages(tmp_path)
    with pytest.raises(ConfigError, match="cannot be reached, or holds no prepared set"):
        PreparedImages(f"file://{tmp_path}/nowhere", cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="cannot be opened"):
        PreparedImages("gopher://bucket/set", cache=tmp_path / "cache")


def test_a_file_that_is_cut_off_while_it_is_read_is_named(shards, tmp_path):
    out = damaged(shards, tmp_path, "index.json", None)
    found = PreparedImages(out)
    with (out / "chunk-0-3.bin").open("r+b") as file:
        file.truncate(400)
    with pytest.raises(ConfigError, match="ends before"):
        found[359]


@pytest.mark.parametrize("size", [1, 5, 99, 100, 101, 350, 1000])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_windows_are_an_order_that_needs_each_shard_once(size, window):
    order, places = Windows(10, window), np.arange(size)
    epochs = [order(size, 4, epoch, places) for epoch in (0, 1)]
    for images in epochs:
        assert np.array_equal(np.sort(images), places)
        pieces = np.random.default_rng(0).permutation(size)
        assert np.array_equal(order(size, 4, 0, pieces), epochs[0][pieces])  # any places at once
        needed = [set(images[begin : begin + 1] // 10) for begin in range(size)]
        first = {s: next(p for p in places if s in needed[p]) for s in range(-(-size // 10))}
        last = {s: size - 1 - next(p for p in places if s in needed[size - 1 - p]) for s in first}
        assert all(last[s] - first[s] < 10 * window for s in first)
    assert size < 20 or not np.array_equal(*epochs)


def fetches(monkeypatch) -> Counter:
    """Counts what every storage is asked for, in this process."""
    count, get = Counter(), LocalFileSystem.get_file

    def counted(self, path, *args, **kwargs):
        count[Path(path).name] += 1
        return get(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "get_file", counted)
    monkeypatch.setattr(Windows, "_announce", lambda *args: None)  # no thread: what is asked for is counted
    return count


def test_remote_shards_are_fetched_once_an_epoch(tmp_path, monkeypatch):
    write(digits("train"), tmp_path / "set")
    remote = PreparedImages(f"file://{tmp_path}/set", window=2, cache=tmp_path / "cache", cache_gib=7e-5)
    count, source = fetches(monkeypatch), digits("train")
    batches = iter(KeyedBatches(1437, 20, order=remote.order))
    for _ in range(2 * 1437 // 20):
        rows = [i for _, i in next(batches)]
        remote._files.clear()  # as other processes, which open files anew
        assert torch.equal(remote.batch(rows)["image"], source.batch(rows)["image"])
    assert len(count) == 14 and max(count.values()) == 2  # in two epochs
    assert sum(count.values()) >= 2 * 14 - 7  # what the first left in the cache is not fetched again
    kept = list((tmp_path / "cache").rglob("*.bin"))
    assert len(kept) <= 7  # the longest unused are removed


def test_the_window_that_comes_is_fetched_ahead(tmp_path):
    asked = []
    order = Windows(10, 2, asked.append)
    images = order(95, 0, 0, np.arange(3))
    for thread in list(reading.threading.enumerate()):
        if thread is not reading.threading.current_thread() and thread.daemon:
            thread.join(1)
    order(95, 0, 0, np.arange(3, 6))
    assert len(asked) == 1  # one window is announced once
    epoch = order(95, 0, 0, np.arange(35))  # the short shard among them or not
    assert set(asked[0]) == set((epoch // 10).tolist()) >= set((images // 10).tolist())


def test_no_more_than_the_window_that_comes_is_fetched_ahead(monkeypatch):
    """However small the windows are, for which the cache has to hold three."""

    class Now:
        def __init__(self, target, args, daemon):
            self.start = lambda: target(*args)

    monkeypatch.setattr(reading.threading, "Thread", Now)
    asked = []
    batches = iter(KeyedBatches(200, 5, order=Windows(10, 2, lambda shards: asked.append(set(shards)))))
    for n in range(1, 9):
        coming = [image // 10 for batch in (next(batches) for _ in range(4)) for _, image in batch]
        assert len(asked) == n and set(coming) <= asked[-1] and len(asked[-1]) == 4


def test_a_transfer_that_arrives_damaged_is_refused(shards, tmp_path, monkeypatch):
    out = damaged(shards, tmp_path, "chunk-0-1.bin", lambda b: b[:-1] + bytes([b[-1] ^ 1]))
    monkeypatch.setattr(reading.time, "sleep", lambda _: None)
    remote = PreparedImages(f"file://{out}", cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"chunk-0-1.bin: cannot be fetched in 3 tries .*checksum"):
        remote.batch(range(360))


def test_a_cache_too_small_for_three_windows_is_refused(shards, tmp_path):
    with pytest.raises(ConfigError, match=r"data.cache_gib=.*: three windows"):
        PreparedImages(f"file://{shards}", cache=tmp_path, cache_gib=1e-5)


def _reads(url, cache, rank, results):
    remote = PreparedImages(url, window=2, cache=cache)
    batches = iter(KeyedBatches(len(remote), 24, rank=rank, world_size=2, order=remote.order))
    results.put(
        (rank, [remote.batch([i for _, i in next(batches)])["image"].sum().item() for _ in range(15)])
    )


def test_processes_share_a_cache(shards, tmp_path):
    """Two at once, of which each has half of every batch."""
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    url, cache = f"file://{shards}", tmp_path / "cache"
    ranks = [fork.Process(target=_reads, args=(url, cache, rank, results)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    found = dict(results.get(timeout=1800) for _ in ranks)
    for rank in ranks:
        rank.join()
    whole = iter(KeyedBatches(360, 24, order=Windows(104, 2)))
    for a, b in zip(found[0], found[1], strict=True):
        assert a + b == digits("test").batch([i for _, i in next(whole)])["image"].sum().item()


@pytest.mark.parametrize("workers", [0, 5])
def test_a_data_module_resumes_to_the_bit(shards, tmp_path, workers):
    """With more workers than shards, too."""
    options = {"batch_size": 50, "num_workers": workers, "seed": 1, "pin_memory": False}
    (tmp_path / "train").symlink_to(shards)
    (tmp_path / "test").symlink_to(shards)
    data = data_module(str(tmp_path), **options)
    data.check()
    assert not data.keyed_train().is_looked_up
    memory = ImageDataModule(digits("test"), digits("test"), batch_size=50, seed=1, pin_memory=False)
    for batch, expected, _ in zip(
        data.train_dataloader(), memory.train_dataloader(), range(10), strict=False
    ):
        assert all(torch.equal(batch[k], expected[k]) for k in expected)


def test_a_zip_is_read_by_others_and_by_us(tmp_path):
    source = digits("test")
    write_zip(source, tmp_path / "test.zip", workers=2, bar=through)
    found = ImageFiles(tmp_path / "test.zip", channels=1)
    assert torch.equal(found.labels, source.labels) and found.classes == source.classes
    assert all(torch.equal(found[i]["image"], source[i]["image"]) for i in range(360))
    with zipfile.ZipFile(tmp_path / "test.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["labels"][2] == [
            "00000/img00000002.png",
            source[2]["label"],
        ]
    with pytest.raises(ConfigError, match="exists: choose another"):
        write_zip(source, tmp_path / "test.zip", workers=0, bar=through)
    with pytest.raises(ConfigError, match="uint8 images of 1 or 3 channels"):
        write_zip(Fields(), tmp_path / "fields.zip", workers=0, bar=through)


def test_a_transform_sees_prepared_images(shards):
    data = KeyedDataset(PreparedImages(shards), lambda image, g: image.flip(-1))
    assert torch.equal(data[0, 5]["image"][0], digits("test")[5]["image"].flip(-1))
