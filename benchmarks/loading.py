"""What a data set of JPEGs costs before and during training: headers read by a scan, and images decoded small
at once (`draft`) or whole and then resized, with the PSNR between the two.

    python benchmarks/loading.py                 # 200 pictures of noise at every scale, half a minute
    python benchmarks/loading.py --data <folder> # or zip: the first 200 images there, resized to 500 x 375

All files are 500 x 375 pixels, ImageNet's average, of quality 92; the sides take turns on one thread and are
compared by CPU seconds, reading the file (from the system's cache) included.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from augment import compare
from PIL import Image

from lit_gen.data.archive import open_store
from lit_gen.data.decode import EXTENSIONS, decode
from lit_gen.data.reader import ImageReader

WIDTH, HEIGHT, QUALITY = 500, 375, 92
SCALES = (64, 32, 16, 8, 4, 2, 1)


def noise(count: int) -> Iterator[Image.Image]:
    """Noise of which every octave has the amplitude of its scale to the power 1/4: files about as large as
    photographs'."""
    dice, weights = np.random.default_rng(0), np.power(SCALES, 0.25)
    for _ in range(count):
        sizes = [(HEIGHT // k + 2, WIDTH // k + 2, 3) for k in SCALES]
        layers = [Image.fromarray(dice.integers(0, 256, size, np.uint8)) for size in sizes]
        layers = [np.asarray(x.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), float) for x in layers]
        yield Image.fromarray(np.average(layers, 0, weights=weights).astype(np.uint8))


def pictures(path: Path, count: int) -> Iterator[Image.Image]:
    store = open_store(path)
    names = [name for name in store.names if Path(name).suffix.lower() in EXTENSIONS]
    for name in names[:count]:
        image = Image.fromarray(decode(store.read(name), name).permute(1, 2, 0).numpy())
        yield image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).square().mean().item()
    return 10 * np.log10(255**2 / error) if error else np.inf


def benchmark(folder: Path, image_size: int, seconds: float) -> None:
    """Prints the table of the JPEGs in `folder`."""
    store = open_store(folder)
    names = sorted(store.names)
    readers = {draft: ImageReader(store, image_size=image_size, draft=draft) for draft in (True, False)}

    def read(draft: bool) -> int:
        for name in names[:50]:
            readers[draft].read(name)
        return len(names[:50])

    def scan() -> int:
        sizes, bad = ImageReader(store).scan(names)
        assert not bad and set(sizes.values()) == {(HEIGHT, WIDTH)}
        return len(names)

    mean = statistics.mean((folder / name).stat().st_size for name in names) / 1024
    sides = {
        f"decoded for {image_size} x {image_size}, draft": lambda: read(True),
        f"decoded whole, resized to {image_size} x {image_size}": lambda: read(False),
        "scanned by their headers": scan,
    }
    compare(f"{len(names)} JPEGs of {WIDTH} x {HEIGHT}, {mean:.0f} KiB on average", sides, seconds)
    quality = [psnr(*(reader.read(name) for reader in readers.values())) for name in names]
    # An infinite one: a picture less than four times `image_size` is decoded whole either way.
    print(f"  PSNR of a draft: {statistics.mean(quality):.1f} dB on average, {min(quality):.1f} dB at least")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder or zip of images, instead of noise")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, nargs="+", default=[64], help="what images are resized to")
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU seconds a side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = noise(args.images) if args.data is None else pictures(args.data, args.images)
        for i, image in enumerate(made):
            image.save(Path(folder) / f"{i:05}.jpg", quality=QUALITY)
        for size in args.size:
            benchmark(Path(folder), size, args.seconds)


if __name__ == "__main__":
    main()
