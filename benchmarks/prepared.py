"""What it costs to begin reading a data set and to read it in random order, by its size: a set that
`lit-gen prepare` has written, a folder of PNGs with PIL, WebDataset's tars of PNGs, and litdata's own reader;
and what the order of an epoch costs.

    python benchmarks/prepared.py --sizes 10000 100000 1000000     # minutes, and 5 GiB of disk for the last
    python benchmarks/prepared.py --sizes 10000 --seconds 1

The images are 32 x 32 in color, 1,000 different ones. Every figure is that of a process of its own, which
reads batches of 256 without workers: CPU seconds until the first batch, imports left out; what the resident
memory has grown by after `--seconds` of reading; and images per CPU second of that reading, from the system's
cache. A folder of more than 10^5 files is left out: they take longer to make than to measure.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from lit_gen.data.keyed import KeyedBatches, KeyedDataset
from lit_gen.data.prepared import PreparedImages
from lit_gen.data.shards import write_shards

BATCH, DIFFERENT, MOST_FILES = 256, 1000, 100_000


class Synthetic:
    """`size` smooth images."""

    labels, classes = None, ()

    def __init__(self, size: int):
        small = np.random.default_rng(0).integers(0, 256, (DIFFERENT, 8, 8, 3), np.uint8)
        self.pictures = [Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC) for x in small]
        self.images = torch.from_numpy(np.stack([np.array(x) for x in self.pictures]).transpose(0, 3, 1, 2))
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i >= self.size:
            raise IndexError(i)
        return {"image": self.images[i % DIFFERENT], "label": 0}

    def fingerprint(self) -> str:
        return f"synthetic-{self.size}"


def make(folder: Path, size: int) -> None:
    """The same images in every form."""
    data, pngs = Synthetic(size), []
    for picture in data.pictures:
        file = io.BytesIO()
        picture.save(file, "png")
        pngs.append(file.getvalue())
    write_shards(data, str(folder / "prepared"), workers=1, shard_mib=64, bar=lambda results, total: results)
    per_tar = 20_000  # 64 MiB of pixels
    (folder / "tars").mkdir()
    for begin in range(0, size, per_tar):
        with tarfile.open(folder / "tars" / f"{begin // per_tar:05}.tar", "w") as archive:
            for i in range(begin, min(begin + per_tar, size)):
                entry = tarfile.TarInfo(f"{i:08}.png")
                entry.size = len(pngs[i % DIFFERENT])
                archive.addfile(entry, io.BytesIO(pngs[i % DIFFERENT]))
    if size <= MOST_FILES:
        for i in range(size):
            file = folder / "files" / f"{i // 1000:05}" / f"{i:08}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(pngs[i % DIFFERENT])


def prepared(folder: Path) -> Iterator[Any]:
    data = PreparedImages(folder / "prepared")
    keyed = KeyedDataset(data)
    for keys in KeyedBatches(len(data), BATCH, order=data.order):
        yield keyed.__getitems__(keys)


def pil(folder: Path) -> Iterator[Any]:
    """As torchvision's ImageFolder does it."""
    names = sorted(p for folder in (folder / "files").iterdir() for p in folder.iterdir())

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(names)

        def __getitem__(self, i: int) -> torch.Tensor:
            return torch.from_numpy(np.array(Image.open(names[i]).convert("RGB")).transpose(2, 0, 1).copy())

    while True:
        yield from torch.utils.data.DataLoader(Files(), BATCH, shuffle=True)


def webdataset(folder: Path) -> Iterator[Any]:
    import webdataset

    tars = sorted(map(str, (folder / "tars").iterdir()))
    data = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(1000).decode("rgb8")
    return iter(data.to_tuple("png").batched(BATCH).repeat())


def litdata_shuffled(folder: Path) -> Iterator[Any]:
    """Its own order: chunks in turn, the records of each shuffled."""
    import litdata

    data = litdata.StreamingDataset(str(folder / "prepared"), shuffle=True)
    while True:
        stream = iter(data)
        while batch := list(islice(stream, BATCH)):
            yield np.stack([item["image"] for item in batch])


def litdata_by_index(folder: Path) -> Iterator[Any]:
    import litdata

    data = litdata.StreamingDataset(str(folder / "prepared"))
    for keys in KeyedBatches(len(data), BATCH):
        yield np.stack([data[i]["image"] for _, i in keys])


SIDES: dict[str, Callable[[Path], Iterator[Any]]] = {
    "data=prepared": prepared,
    "files, PIL, and DataLoader": pil,
    "WebDataset": webdataset,
    "litdata, in its shuffled order": litdata_shuffled,
    "litdata, by random index": litdata_by_index,
}
IMPORTS = {"WebDataset": "webdataset"} | {name: "litdata" for name in SIDES if name.startswith("litdata")}


def resident() -> float:
    """MiB of this process's memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure(side: str, folder: Path, seconds: float) -> dict[str, float]:
    if side in IMPORTS:
        __import__(IMPORTS[side])
    torch.set_num_threads(1)
    before, begin = resident(), time.process_time()
    batches = SIDES[side](folder)
    next(batches)
    start, count, begin = time.process_time() - begin, 0, time.process_time()
    while time.process_time() < begin + seconds:
        next(batches)
        count += BATCH
    return {
        "start": start,
        "memory": resident() - before,
        "images": count / (time.process_time() - begin),
    }


def order() -> None:
    """Until the first batch of an epoch of 10^9 images."""
    before, begin = resident(), time.process_time()
    next(iter(KeyedBatches(10**9, BATCH, start=12_345)))
    seconds, memory = time.process_time() - begin, resident() - before
    print(f"order of 10^9 images: first batch after {seconds:.4f} CPU s, {memory:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000])
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds a side")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # side and folder, in this process
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.seconds)))
        return
    order()
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), size)
            print(f"\n{size:,} images: CPU s to the first batch, MiB, images per CPU s", flush=True)
            for side in SIDES:
                if side.startswith("files") and size > MOST_FILES:
                    continue
                command = [
                    sys.executable,
                    __file__,
                    "--measure",
                    side,
                    folder,
                    "--seconds",
                    str(args.seconds),
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"  {side}: {done.stderr.splitlines()[-1]}")
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                numbers = f"{found['start']:8.3f} {found['memory']:8.1f} {found['images']:10,.0f}"
                print(f"  {side:<32} {numbers}", flush=True)


if __name__ == "__main__":
    main()
