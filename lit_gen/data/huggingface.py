"""Images of the Hugging Face hub, or of a folder that its library `datasets` has saved, as a data set."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lit_gen.data.decode import ImageSize, UnreadableImage, decode
from lit_gen.data.images import fingerprint, part_of
from lit_gen.errors import ConfigError


class HubImages:
    """A split of a data set of the hub (`name`, "owner/name", perhaps with `config`), or of a folder that
    `save_to_disk` wrote: `ds[i] -> {"image": uint8 (C, H, W), "label": int}`.

    `image_column` and `label_column` None are the first column of images, and the first of class labels if
    there is one. `image_size`, `fit`, and `channels` as in `lit_gen.data.decode`. `part`: "train" or "test"
    of a split of the rows, `test_fraction` of them test. Raises ConfigError where the package, the data set,
    the split, or a column is missing.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        config: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        image_size: ImageSize | None = None,
        channels: int = 3,
        fit: str = "crop",
        part: str = "all",
        test_fraction: float = 0.1,
        seed: int = 0,
    ):
        splits = load(name, config)
        if split not in splits:
            raise ConfigError(f"{name} has no split {split!r}; it has {', '.join(splits)}.")
        rows, datasets = splits[split], package()
        self.name, self.options = name, {"channels": channels, "image_size": image_size, "fit": fit}
        features = rows.features
        self.image_column = _column(name, features, image_column, datasets.Image, "images")
        if self.image_column is None:
            raise ConfigError(f"{name}: no column of images among {', '.join(features)}.")
        label_column = _column(name, features, label_column, datasets.ClassLabel, "class labels")
        rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        labels = None if label_column is None else list(rows[label_column])
        self.classes = [] if label_column is None else list(features[label_column].names)
        if part != "all":
            chosen = part_of([str(i) for i in range(len(rows))], labels, part, test_fraction, seed)
            rows, labels = rows.select(chosen), None if labels is None else [labels[i] for i in chosen]
        self.rows, self.labels = rows, None if labels is None else torch.tensor(labels)
        self.shape = tuple(self[0]["image"].shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        stored, where = self.rows[i][self.image_column], f"{self.name}, row {i}"
        if stored is None:
            raise UnreadableImage(f"{where}: has no image.")
        data = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        image = decode(data, where, draft=True, **self.options)
        return {"image": image, "label": 0 if self.labels is None else int(self.labels[i])}

    def fingerprint(self) -> str:
        options = json.dumps(self.options | {"column": self.image_column}, sort_keys=True)
        return fingerprint(self.name.replace("/", "_"), len(self), [options, self.rows._fingerprint])


def data_module(
    name: str,
    config: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    test_fraction: float = 0.1,
    fit: str = "crop",
    **options: Any,
) -> Any:
    """The `ImageDataModule` of a data set of the hub. `test_split` None is "test" or "validation" if there is
    one, else `test_fraction` of the training split. `options` are its other arguments."""
    from lit_gen.data.module import ImageDataModule  # Lightning takes seconds, and workers do without it

    shared: dict[str, Any] = {n: options[n] for n in ("image_size", "channels") if n in options}
    shared |= {"config": config, "image_column": image_column, "label_column": label_column, "fit": fit}

    def split_of(part: str) -> HubImages:
        test = test_split or next((s for s in ("test", "validation") if s in load(name, config)), None)
        if test is None:
            seed = options.get("seed", 0)
            return HubImages(name, train_split, part=part, test_fraction=test_fraction, seed=seed, **shared)
        return HubImages(name, train_split if part == "train" else test, **shared)

    return ImageDataModule(partial(split_of, "train"), partial(split_of, "test"), **options)


def package() -> Any:
    """The package datasets. Raises ConfigError where it is not installed."""
    try:
        import datasets  # pyright: ignore[reportMissingImports] an extra
    except ImportError as error:
        raise ConfigError(
            "data=huggingface needs the package datasets: pip install lit-gen[huggingface]."
        ) from error
    return datasets


def load(name: str, config: str | None = None) -> dict[str, Any]:
    """The splits of a data set, from the hub, its cache, or a folder that `save_to_disk` wrote."""
    datasets = package()
    try:
        if Path(name).expanduser().is_dir():
            found = datasets.load_from_disk(str(Path(name).expanduser()))
        else:
            found = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"data.name={name}: the data set could not be loaded ({said}).") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _column(name: str, features: dict[str, Any], wanted: str | None, kind: type, what: str) -> str | None:
    """The column that is wanted, or the first of a kind, if there is one."""
    if wanted is None:
        return next((column for column, feature in features.items() if isinstance(feature, kind)), None)
    if not isinstance(features.get(wanted), kind):
        raise ConfigError(
            f"{name}: {wanted!r} is no column of {what}; its columns are {', '.join(features)}."
        )
    return wanted
