"""ImageFiles: the images of a folder or of a zip, with a class per sub-folder or per dataset.json.

The zip layout is that of StyleGAN's and EDM's data-set tools (https://github.com/NVlabs/edm,
dataset_tool.py): image files and a `dataset.json` of {"labels": [[name, class index], ...] or null};
`"classes": [...]` beside it names the classes.
"""

import json
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor

from lit_gen.data.archive import Store, open_store
from lit_gen.data.decode import UnreadableImage
from lit_gen.data.images import fingerprint, part_of
from lit_gen.data.reader import ImageForm, ImageReader, summary
from lit_gen.errors import ConfigError

MAX_CLASSES = 1_000_000  # a label beyond is a mistake, and would make a list of names that fills the memory


class ImageFiles:
    """Images in files, `ds[i] -> {"image": (C, H, W), "label": int}`, in the order of their names: pictures
    as uint8, or arrays as they are stored (`lit_gen.data.arrays`).

    Classes: those of `dataset.json` at the root if there is one, else one per folder: the folders above an
    image, without those that all images share, name its class. Images in one folder have no classes.

    - `include`: only files whose name matches this pattern ("*/train_*"); `classes`: only these, numbered in
      this order.
    - `labeled`: false leaves the classes out, whatever folders there are.
    - `part`: "train" or "test" of a split per class that depends on `seed` and the file's name alone,
      `test_fraction` of it test.
    - `scan`: read the header of every image at the start, so that what is no image, or not of the others'
      size, is found before training (30,000 images a CPU second; arrays are read whole, their values
      checked). Images are decoded when they are read.
    - `on_error`: "raise" names what cannot be read, by the scan or when it is read. "replace" puts another
      image of its class, drawn by `seed` and the image's number, in its place, with a warning. "skip" leaves
      unreadable images out (`skipped`: name -> reason), for which a scan decodes every image once: minutes
      to hours for a large set, in each process.
    - `options`: see `lit_gen.data.reader.ImageReader`. Without an `image_size` images must be equal in size.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        classes: Sequence[str] | None = None,
        include: str = "*",
        part: str = "all",
        test_fraction: float = 0.1,
        seed: int = 0,
        scan: bool = True,
        labeled: bool = True,
        on_error: str = "raise",
        **options: Any,
    ):
        if on_error == "skip" and not scan:
            raise ConfigError(
                "on_error=skip needs scan=true: what is left out must be known before the first epoch."
            )
        self.store, self.seed = open_store(path), seed
        self.reader = ImageReader(self.store, on_error=on_error, **options)
        self.pixels = self.reader.pixels
        names, labels, self.classes = listing(self.store, self.reader.form, include, labeled)
        if classes is not None:
            names, labels, self.classes = _only(names, labels, self.classes, classes, self.store)
        chosen = part_of(names, labels, part, test_fraction, seed)
        if not chosen:
            raise ConfigError(
                f"{self.store.path}: no image left for part={part!r}, test_fraction={test_fraction}."
            )
        self.skipped: dict[str, str] = {}
        sizes = self._scan([names[i] for i in chosen]) if scan else {}
        chosen = [i for i in chosen if names[i] not in self.skipped]
        self.names = [names[i] for i in chosen]
        self.labels: Tensor | None = None if labels is None else torch.tensor([labels[i] for i in chosen])
        self.shape = tuple(self._read(0).shape)
        for name, size in sizes.items():
            self._check_size(name, *self.reader.form.fitted(size))

    def _scan(self, names: list[str]) -> dict[str, tuple[int, int]]:
        """(height, width) of the readable images by name."""
        on_error = self.reader.on_error
        sizes, bad = self.reader.scan(names, decode_all=on_error == "skip")
        if bad and on_error == "raise":
            raise ConfigError(summary(list(bad.values()), "unreadable image"))
        if not sizes:
            raise ConfigError(f"{self.store.path}: all {len(bad)} images are unreadable.")
        if on_error == "skip":
            self.skipped = bad
        return sizes

    def _check_size(self, name: str, height: int, width: int) -> None:
        _, h, w = self.shape
        if (height, width) != (h, w) and not self.reader.keeps_shape:
            raise UnreadableImage(
                f"{self.store.path}: {name} is {width}x{height} (width x height), where the first image says"
                f" {w}x{h}. {self.reader.remedy}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = self._read(i)
        self._check_size(self.names[i], *image.shape[1:])
        return {"image": image, "label": 0 if self.labels is None else int(self.labels[i])}

    def _read(self, i: int) -> Tensor:
        return self.reader.read_or_replace(self.names, i, self._same_class, self.seed)[1]

    def _same_class(self, i: int) -> Sequence[int]:
        """The numbers of the images of image i's class; of all where there are no classes."""
        if self.labels is None:
            return range(len(self))
        return (self.labels == self.labels[i]).nonzero()[:, 0].tolist()

    def fingerprint(self) -> str:
        """A name that changes with whatever changes the images, told by their files' size and time of change
        (in a zip size and checksum): nothing is decoded."""
        replaced = {"replaced_by": self.seed} if self.reader.on_error == "replace" else {}
        options = json.dumps(self.reader.options | replaced, sort_keys=True)
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        files = (f"{name}\0{self.store.signature(name)}\0" for name in self.names)
        return fingerprint(self.store.path.stem, len(self), chain([options, labels], files))


def data_module(
    path: str, *, labeled: bool = True, test_fraction: float = 0.1, on_error: str = "raise", **options: Any
) -> Any:
    """The `ImageDataModule` of one folder or zip, `test_fraction` of it (of every class) for testing;
    `options` are its other arguments."""
    from lit_gen.data.module import ImageDataModule  # Lightning takes seconds, and workers do without it

    shared = ("image_size", "channels", "dtype", "range", "shown", "seed")
    files = {name: options[name] for name in shared if name in options}
    files |= {"labeled": labeled, "test_fraction": test_fraction, "on_error": on_error}
    sets = {split: partial(ImageFiles, path, part=split, **files) for split in ("train", "test")}
    return ImageDataModule(**sets, **options)


Listing = tuple[list[str], list[int] | None, list[str]]  # names, labels, classes


def listing(store: Store, form: ImageForm, include: str = "*", labeled: bool = True) -> Listing:
    """(names, labels, classes) of the images of a form, as `ImageFiles` tells them.

    Raises ConfigError where there are none, and where classes cannot be told.
    """
    images = form.chosen(store.names)
    if not images:
        raise ConfigError(
            f"{store.path}: no images ({', '.join(form.endings)}) among its {len(store.names)} files."
        )
    names = [n for n in images if fnmatchcase(n, include)]
    if not names:
        raise ConfigError(
            f"{store.path}: no image matches include={include!r}; one of the {len(images)} is {images[0]!r}."
        )
    if not labeled:
        return names, None, []
    if "dataset.json" in store.names and (described := _described(store, names)) is not None:
        return described
    # Classes from all images, so that a pattern for the test images numbers them as the one for the training
    # images does.
    folders = _class_of_each(images)
    classes = sorted(set(folders.values()))
    if len(classes) == 1:
        return names, None, []
    if "" in classes:
        loose = next(n for n, c in folders.items() if not c)
        raise ConfigError(f"{store.path}: {loose} lies beside the class folders. Move it into one.")
    number = {c: i for i, c in enumerate(classes)}
    return names, [number[folders[n]] for n in names], classes


def _class_of_each(names: Sequence[str]) -> dict[str, str]:
    """The folders above each image, without those that all images share."""
    folders = [n.split("/")[:-1] for n in names]
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False)))
    return {n: "/".join(some[shared:]) for n, some in zip(names, folders, strict=True)}


def _described(store: Store, names: list[str]) -> Listing | None:
    """The listing that dataset.json gives; None where its labels are null."""
    where = f"{store.path}/dataset.json"
    try:
        described = json.loads(store.read("dataset.json"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error}).") from error
    rows = described.get("labels") if isinstance(described, dict) else ()
    if rows is None:
        return None
    try:
        label = {name.replace("\\", "/"): index for name, index in rows}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f'{where}: "labels" must be null or a list of [file name, class index].') from error
    if missing := [n for n in names if n not in label]:
        raise ConfigError(f"{where}: has no label for {len(missing)} images, {missing[0]} for one.")
    labels = [label[n] for n in names]
    classes = described.get("classes")
    if bad := [
        (n, x) for n, x in zip(names, labels, strict=True) if type(x) is not int or not 0 <= x < MAX_CLASSES
    ]:
        raise ConfigError(
            f"{where}: the label of {bad[0][0]} is {bad[0][1]!r}; lit_gen takes class indices 0, 1, 2 ..."
        )
    if classes is None:
        classes = [str(i) for i in range(1 + max(labels))]
    if not isinstance(classes, list) or max(labels) >= len(classes):
        raise ConfigError(f'{where}: "classes" must be a list that names all {max(labels) + 1} classes.')
    return names, labels, [str(c) for c in classes]


def _only(
    names: list[str], labels: list[int] | None, classes: list[str], wanted: Sequence[str], store: Store
) -> Listing:
    wanted = [str(c) for c in wanted]
    unknown = wanted if labels is None else [c for c in wanted if c not in classes]
    if labels is None or unknown:
        has = "it has no classes"
        if classes:
            has = f"its {len(classes)} classes begin with {', '.join(classes[:5])}"
        raise ConfigError(f"{store.path}: unknown class {unknown[0]!r}; {has}.")
    number = {classes.index(c): i for i, c in enumerate(wanted)}
    kept = [i for i, x in enumerate(labels) if x in number]
    return [names[i] for i in kept], [number[labels[i]] for i in kept], wanted
