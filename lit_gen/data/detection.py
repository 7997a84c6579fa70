"""Images with boxes, in the layouts of PASCAL VOC and COCO.

A detection set gives `ds[i] -> {"image": uint8 (3, H, W), "boxes": float32 (N, 4), "labels": int64 (N,)}`,
without randomness; boxes are xyxy in pixels, 0 <= x0 < x1 <= W, N >= 0; `ds.classes` names the labels 0, 1,
...

VOC: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. COCO:
https://cocodataset.org/#format-data
"""

import json
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_gen.data.archive import Store, open_store
from lit_gen.data.decode import EXTENSIONS
from lit_gen.data.images import fingerprint
from lit_gen.data.reader import ImageReader, summary
from lit_gen.errors import ConfigError

SLACK = 1.0  # pixels that a box may leave the image by: annotators and conventions round differently


Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
Object = tuple[str, Box]  # of a class


class Record(NamedTuple):
    """One image's annotation, and the file that says so."""

    image: str
    objects: list[Object]
    where: str


class BoxedImages:
    """Annotated images of a store, checked when made.

    Bad are: a missing or unreadable image (left out by `on_error="skip"`, see `skipped`: image -> reason),
    and a box that is outside its image by more than a pixel, empty or inverted, or of an unknown class
    (dropped by "skip", see `dropped`). `on_error="raise"` names them by file in one ConfigError. At the start
    headers are read, which give the sizes; pixels are decoded when they are read, and what then turns out
    to be broken raises. Not with "skip", which decodes every image once at the start unless `scan=False`, nor
    with "replace", which leaves out as "skip" does but decodes none, and puts another image with its boxes in
    the place of a broken one. `image_size` stretches images and boxes to a square; None leaves them.
    `options`: see `lit_gen.data.reader.ImageReader`.
    """

    def __init__(
        self,
        store: Store,
        records: Iterable[Record],
        classes: Sequence[str],
        *,
        problems: dict[str, str] | None = None,
        scan: bool = True,
        image_size: int | None = None,
        on_error: str = "raise",
        **options: Any,
    ):
        self.store, self.classes, self.image_size = store, list(classes), image_size
        self.reader = ImageReader(store, image_size=image_size, fit="stretch", on_error=on_error, **options)
        self.skipped: dict[str, str] = dict(problems or {})
        self.dropped: list[str] = []
        sizes, records = self._readable(list(records), scan and on_error == "skip")
        number = {c: i for i, c in enumerate(self.classes)}
        self.names: list[str] = []
        self._boxes: list[Tensor] = []
        self._labels: list[Tensor] = []
        for record in records:
            self._admit(record, number, *sizes[record.image])
        if on_error == "raise" and (messages := [*self.skipped.values(), *self.dropped]):
            raise ConfigError(summary(messages, "bad annotation"))
        if not self.names:
            raise ConfigError(f"{store.path}: no annotated image is left ({len(self.skipped)} are bad).")

    def _readable(
        self, records: list[Record], decode_all: bool
    ) -> tuple[dict[str, tuple[int, int]], list[Record]]:
        """(height, width) by image, and the records of those that can be read."""
        present, known = set(self.store.names), []
        for record in records:
            if record.image in present:
                known.append(record)
            else:
                self.skipped[record.image] = f"{record.where}: its image {record.image} is missing."
        names = list(dict.fromkeys(r.image for r in known))
        sizes, bad = self.reader.scan(names, decode_all=decode_all, turned=True)
        self.skipped |= bad
        return sizes, [r for r in known if r.image in sizes]

    def _admit(self, record: Record, number: dict[str, int], height: int, width: int) -> None:
        boxes, labels = [], []
        for name, box in record.objects:
            wrong = f"unknown class {name!r}" if name not in number else _wrong(box, height, width)
            if wrong:
                self.dropped.append(f"{record.where}: {wrong}.")
            else:
                boxes.append([min(max(v, 0), side) for v, side in zip(box, (width, height) * 2, strict=True)])
                labels.append(number[name])
        scale = torch.ones(4)
        if self.image_size is not None:
            scale = torch.tensor([self.image_size / width, self.image_size / height] * 2)
        self.names.append(record.image)
        self._boxes.append(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) * scale)
        self._labels.append(torch.tensor(labels, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        i, image = self.reader.read_or_replace(self.names, i, lambda _: range(len(self)), seed=0)
        return {"image": image, "boxes": self._boxes[i].clone(), "labels": self._labels[i].clone()}

    def fingerprint(self) -> str:
        options = self.reader.options | ({"replaced": True} if self.reader.on_error == "replace" else {})
        files = (
            f"{name}\0{self.store.signature(name)}\0{boxes.tolist()}\0{labels.tolist()}"
            for name, boxes, labels in zip(self.names, self._boxes, self._labels, strict=True)
        )
        settings = json.dumps([options, self.classes], sort_keys=True)
        return fingerprint(self.store.path.stem, len(self), chain([settings], files))


def _wrong(box: Box, height: int, width: int) -> str:
    """What is wrong with a box in an image of this size; empty for nothing."""
    x0, y0, x1, y1 = box
    text = f"box ({', '.join(f'{v:g}' for v in box)})"
    if not all(map(math.isfinite, box)):
        return f"{text} is not finite"
    if min(x0, y0) < -SLACK or x1 > width + SLACK or y1 > height + SLACK:
        return f"{text} lies outside the {width}x{height} image"
    if min(x1, width) <= max(x0, 0) or min(y1, height) <= max(y0, 0):
        return f"{text} is empty or inverted"
    return ""


# --- PASCAL VOC ------------------------------------------------------------------------------------------


def voc(
    path: str | os.PathLike,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    *,
    difficult: bool = True,
    **options: Any,
) -> BoxedImages:
    """The PASCAL VOC layout in a folder or zip: JPEGImages, Annotations/*.xml, ImageSets/Main/<split>.txt.

    `path` may lie above the folder of these three if it holds but one. `split=None` takes every annotated
    image. `classes=None` takes those that occur in any annotation, sorted, whatever the split. VOC's pixels
    count from 1 and its boxes include both corners: (xmin, ymin, xmax, ymax) becomes (xmin - 1, ymin - 1,
    xmax, ymax). `difficult=False` leaves difficult objects out. `options`: see `BoxedImages`. Raises
    ConfigError, also for annotations that are no XML of this form.
    """
    store = open_store(path)
    root = _voc_root(store)
    annotations, images = (
        {_stem(n): n for n in store.names if n.startswith(f"{root}{folder}/") and n.lower().endswith(ends)}
        for folder, ends in (("Annotations", ".xml"), ("JPEGImages", EXTENSIONS))
    )
    wanted = sorted(annotations) if split is None else _voc_split(store, root, split)
    records, problems, seen = [], {}, set()
    for name in sorted({*wanted, *annotations}) if classes is None else wanted:
        where = annotations.get(name, f"{root}Annotations/{name}.xml")
        try:
            objects = _voc_objects(store, where, difficult)
        except ConfigError as error:
            problems[where] = str(error)
            continue
        seen.update(c for c, _ in objects)
        if name in wanted:
            image = images.get(name, f"{root}JPEGImages/{name}.jpg")
            records.append(Record(image, objects, f"{store.path}/{where}"))
    chosen = sorted(seen) if classes is None else classes
    return BoxedImages(store, records, chosen, problems=problems, **options)


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _voc_root(store: Store) -> str:
    roots = sorted(
        {n.rpartition("Annotations/")[0] for n in store.names if "Annotations/" in n and n.endswith(".xml")}
    )
    if len(roots) != 1:
        found = f"{len(roots)} of them: {', '.join(roots[:4])}" if roots else "none"
        raise ConfigError(
            f"{store.path}: needs one VOC folder (Annotations, JPEGImages), found {found}. Give its path."
        )
    return roots[0]


def _voc_split(store: Store, root: str, split: str) -> list[str]:
    folder = f"{root}ImageSets/Main/"
    name = f"{folder}{split}.txt"
    if name not in store.names:
        there = [_stem(n) for n in store.names if n.startswith(folder)]
        raise ConfigError(
            f"{store.path}: no split {split!r} in {folder}; there are {', '.join(there) or 'none'}."
        )
    lines = store.read(name).decode("utf-8", "replace").splitlines()
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


class _NoDoctype(ET.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ConfigError("it declares a document type, which annotations do not need and entity bombs do")


def _voc_objects(store: Store, name: str, difficult: bool) -> list[Object]:
    where = f"{store.path}/{name}"
    try:
        root = ET.fromstring(store.read(name), ET.XMLParser(target=_NoDoctype()))
        objects = []
        for node in root.findall("object"):
            sides = ("xmin", "ymin", "xmax", "ymax")
            x0, y0, x1, y1 = (float(node.findtext(f"bndbox/{side}", "")) for side in sides)
            if difficult or int(node.findtext("difficult", "0")) == 0:
                objects.append(((node.findtext("name") or "").strip(), (x0 - 1, y0 - 1, x1, y1)))
    except (ET.ParseError, ValueError, LookupError) as error:  # ConfigError is a ValueError
        raise ConfigError(f"{where}: not a VOC annotation ({error}).") from error
    return objects


# --- COCO ------------------------------------------------------------------------------------------------


def coco(
    path: str | os.PathLike,
    annotations: str,
    images: str = "",
    **options: Any,
) -> BoxedImages:
    """The COCO layout in a folder or zip: `annotations` is the JSON file, `images` the folder of the images,
    both within `path`.

    Classes are the categories in the order of their ids, labels count from 0. Boxes (x, y, w, h) become (x,
    y, x + w, y + h). Objects with iscrowd = 1 stand for groups and are left out. Images without objects are
    kept. `options`: see `BoxedImages`. Raises ConfigError, also for a file that is not of this form.
    """
    store = open_store(path)
    where = f"{store.path}/{annotations}"
    if annotations not in store.names:
        raise ConfigError(f"{where}: missing. Give the JSON file's path within {store.path}.")
    folder = f"{images.strip('/')}/" if images.strip("/") else ""
    try:
        described = json.loads(store.read(annotations))
        categories = {int(c["id"]): str(c["name"]) for c in described["categories"]}
        files = {int(i["id"]): folder + str(i["file_name"]) for i in described["images"]}
        objects: dict[int, list[Object]] = {i: [] for i in files}
        problems = {}
        for a in described["annotations"]:
            if a.get("iscrowd", 0):
                continue
            x, y, w, h = map(float, a["bbox"])
            name = categories.get(int(a["category_id"]), f"category {a['category_id']}")
            if int(a["image_id"]) in objects:
                objects[int(a["image_id"])].append((name, (x, y, x + w, y + h)))
            else:
                what = f"annotation {a.get('id')}"
                problems[what] = f"{where}: {what} is of no listed image."
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{where}: not a COCO annotation file ({type(error).__name__}: {error})."
        ) from error
    records = [Record(file, objects[i], f"{where}, image {i} ({file})") for i, file in files.items()]
    classes = [name for _, name in sorted(categories.items())]
    return BoxedImages(store, records, classes, problems=problems, **options)
