"""Images that a user names by their path, and statistics of sets whose images are elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from lit_gen.data.archive import open_store
from lit_gen.data.decode import EXTENSIONS, ImageSize, decode
from lit_gen.data.folders import ImageFiles
from lit_gen.data.images import TensorImages
from lit_gen.data.reader import ImageForm
from lit_gen.errors import ConfigError
from lit_gen.images import BYTES, Pixels, height_and_width
from lit_gen.instantiate import instantiate
from lit_gen.metrics import Extractor, Moments, read_images, read_reference
from lit_gen.metrics.distributed import from_rank_zero, rank, world_size
from lit_gen.metrics.files import holds_statistics
from lit_gen.models.conditions import Told, class_index
from lit_gen.models.generation import check_label, classes
from lit_gen.rng import keyed_generator
from lit_gen.score.condition import Label
from lit_gen.score.module import ScoreModule
from lit_gen.score.restoration import Inpainting, Masked, Noise, box_mask

MASKS = ("center", "left", "right", "top", "bottom", "random")


def open_images(
    path: str | Path,
    image_size: ImageSize | None = None,
    fit: str = "crop",
    channels: int = 3,
    dtype: str | None = None,
    range: Sequence[float] | None = None,
) -> Any:
    """The images of a folder, of a zip, or of an npz whose arr_0 is (N, H, W, C), as a data set (the contract
    of `lit_gen.data.images`).

    With `image_size`, a number or (height, width), pictures in files are brought to that size as `fit` says
    (`lit_gen.data.decode`); without it they must be of one size. `channels`, `dtype` and `range` say what
    files hold that are not pictures (`lit_gen.images.Pixels`); of an npz only the range must be said.
    """
    path = Path(path).expanduser()
    if path.suffix == ".npz":
        if image_size is not None:
            raise ConfigError(
                f"image_size={image_size} resizes picture files; the arrays of {path} are taken as they are."
            )
        images = read_images(path)
        pixels = Pixels(str(images.numpy().dtype), range, bounded=False)  # samples may leave it
        return TensorImages(images, name=path.stem, pixels=pixels)
    stored = {"channels": channels, "dtype": dtype or "uint8", "range": range, "bounded": False}
    return ImageFiles(path, image_size=image_size, fit=fit, scan=False, draft=False, **stored)  # exact


def open_reference(
    path: str | Path,
    extractor: Extractor,
    *,
    n: int | None = None,
    resize: str | None = None,
    section: str = "fid",
    **options: Any,
) -> Moments | Any:
    """The moments in a statistics file (TTUR, pytorch-fid, EDM, EDM2, clean-fid, guided-diffusion), or the
    data set that `open_images` gives with the `options`.

    A statistics file does not say how many images made it nor how they were resized: `n` and `resize` must.
    """
    path = Path(path).expanduser()
    if path.suffix != ".pkl" and not (path.suffix == ".npz" and holds_statistics(path)):
        if n is not None or resize is not None:
            raise ConfigError(f"reference_n and reference_resize describe a statistics file, {path} is none.")
        return open_images(path, **options)
    if n is None or resize is None:
        missing = [name for name, x in {"reference_n": n, "reference_resize": resize}.items() if x is None]
        raise ConfigError(
            f"{path} holds statistics and does not say {' nor '.join(missing)}: give reference_n=<number of "
            f"its images> and reference_resize=<how they were resized; {extractor.id} takes "
            f"{extractor.id.resize}>."
        )
    return read_reference(path, extractor.id, n=n, resize=resize, section=section)


def classes_of(*datasets: Any) -> int:
    """The number of classes that the data sets have in common. Raises ConfigError if their classes differ."""
    names = [list(dataset.classes) if dataset.labels is not None else [] for dataset in datasets]
    if not names[0] or any(other != names[0] for other in names):
        shown = " and ".join(str(some[:5]) for some in names)
        raise ConfigError(f"per_class=true needs sets in the same classes (sub-folders), they have {shown}.")
    return len(names[0])


def read_pictures(
    path: Path,
    num: int,
    *,
    channels: int = 3,
    image_size: ImageSize | None = None,
    fit: str = "crop",
    pixels: Pixels = BYTES,
) -> dict[str, Tensor]:
    """The first `num` images of a file, folder or zip: {name: (C, H, W)}, pictures resized as `fit` says
    (`lit_gen.data.decode`) where `image_size` is given; says so if there are more."""
    form = ImageForm(channels, image_size, fit, pixels)
    if path.is_file() and path.suffix.lower() in form.endings:
        return {path.stem: form.read(path.read_bytes(), str(path))}
    if not path.exists():
        raise ConfigError(f"{path}: there is no such image or folder.")
    store = open_store(path)
    names = form.chosen(store.names)
    if not names:
        raise ConfigError(
            f"{path}: no images ({', '.join(form.endings)}) among its {len(store.names)} files."
        )
    if len(names) > num and rank() == 0:
        print(f"{path} has {len(names)} images, the first {num} are taken; num={len(names)} takes all")
    return {
        str(Path(name).with_suffix("")): form.read(store.read(name), f"{path}/{name}") for name in names[:num]
    }


def read_class_folders(
    path: Path, k: int | None, channels: int, size: ImageSize, fit: str = "crop"
) -> dict[str, Tensor]:
    """{class name: uint8 (K, C, H, W)} of an image, a folder of images, or a folder (or zip) of such
    folders, each a class; the first k of them by name, or all.

    Raises ConfigError where a class has fewer than k, naming it.
    """
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        image = decode(path.read_bytes(), str(path), channels=channels, image_size=size, fit=fit)
        classes = {path.stem: image[None]}
    elif not path.exists():
        raise ConfigError(f"classes={path}: there is no such folder.")
    else:
        files = ImageFiles(path, image_size=size, channels=channels, fit=fit, scan=False, draft=False)
        names = files.classes or [path.stem]
        labels = torch.zeros(len(files), dtype=torch.int64) if files.labels is None else files.labels
        members = {name: (labels == i).nonzero()[:k, 0].tolist() for i, name in enumerate(names)}
        classes = {n: torch.stack([files[i]["image"] for i in some]) for n, some in members.items() if some}
    for name, shown in classes.items():
        if k is not None and len(shown) < k:
            raise ConfigError(
                f"k={k}: class {name!r} of {path} has {len(shown)} images. Lower k, or leave it out."
            )
    return classes


def inpainting(mask: str, image_size: ImageSize) -> Inpainting:
    """The operator of a mask that is named or drawn, see `mask_of`."""
    return Inpainting(mask_of(mask, image_size))


def mask_of(spec: str, size: ImageSize) -> Tensor:
    """bool (1, H, W), true where the pixel is known; `size` is one number or (H, W).

    `spec`: center (the middle half of each side is unknown), left, right, top, bottom (that half is
    unknown), random (half of the pixels, always the same ones), or a picture whose pixels above half
    brightness are known.
    """
    h, w = height_and_width(size)
    boxes = {
        "center": (h // 4, w // 4, h // 2, w // 2),
        "left": (0, 0, h, w // 2),
        "right": (0, w // 2, h, w - w // 2),
        "top": (0, 0, h // 2, w),
        "bottom": (h // 2, 0, h - h // 2, w),
    }
    if spec in boxes:
        return box_mask(h, w, *boxes[spec])
    if spec == "random":
        return torch.rand((1, h, w), generator=keyed_generator(0, "mask")) < 0.5
    if not Path(spec).is_file():
        raise ConfigError(f"mask={spec}: must be one of {', '.join(MASKS)}, or a picture.")
    return decode(Path(spec).read_bytes(), spec, channels=1, image_size=(h, w)) > 127


def noise_of(given: float | str, name: str = "noise_std") -> Noise:
    """The deviation of the noise, or what else has this `name`: a number, or a map of the numbers in an npy
    file. Raises ConfigError."""
    path = Path(str(given)).expanduser()
    if path.suffix == ".npy" and path.is_file():
        try:
            found = np.load(path, allow_pickle=False)
            if found.dtype.kind not in "fiu":
                raise ValueError(f"it holds {found.dtype}")
            return torch.from_numpy(found.astype(np.float64))
        except (ValueError, EOFError, OSError) as error:
            raise ConfigError(f"{name}={given}: this is no npy file of numbers ({error}).") from error
    try:
        return float(given)
    except ValueError:
        raise ConfigError(
            f"{name}={given}: give a number, or an npy file with one for each pixel of the measurement."
        ) from None


def masked(floor: float | str, **options: float | str) -> Masked:
    """The observation under a noise of the level `floor`, which, as the `options` `std` and `floor_std`, is a
    number or an npy file (C, H, W) of them; `rate` is a number."""
    maps = {name: noise_of(given, f"operator.{name}") for name, given in options.items() if name != "rate"}
    rate = {"rate": float(options["rate"])} if "rate" in options else {}
    return Masked(noise_of(floor, "operator.floor"), **maps, **rate)


def run_data(run_cfg: DictConfig) -> Any:
    """The data module of a run, which all ranks ask for together, so that a download happens once."""
    data = instantiate(run_cfg.data)
    if world_size() > 1:
        from_rank_zero(data.prepare_data)
    return data


def pictures(cfg: DictConfig, run_cfg: DictConfig | None, module: ScoreModule) -> tuple[Tensor, Label]:
    """The first `cfg.num` images of what `cfg.images` names, (N, C, H, W) as `module.pixels` says, and what a
    conditional model is told about them: int64 (N,), or a `Condition` where it takes more than a class.

    That is what the options say (`Told`), else what is known of each of the run's own images. Other images
    have no class, which only a model trained with `label_dropout` knows: for any other one a ConfigError is
    raised.
    """
    if isinstance(module, ScoreModule):
        module.refuse_latents("What begins with images")
    labels = data = None
    if cfg.images == "test":
        if run_cfg is None:
            raise ConfigError(
                "images=test are those of a run; with weights= give images=<picture, folder or zip>."
            )
        data = run_data(run_cfg)
        dataset = data.dataset("test")
        rows = [dataset[i] for i in range(min(cfg.num, len(dataset)))]
        images = [row["image"] for row in rows]
        labels = torch.tensor([row["label"] for row in rows])
    else:
        channels, *size = module.image_shape
        shown = read_pictures(
            Path(cfg.images), cfg.num, channels=channels, image_size=size, pixels=module.pixels
        )
        images = list(shown.values())
    return torch.stack(images), told_of(cfg, run_cfg, module, len(images), labels, data)


def told_of(
    cfg: DictConfig,
    run_cfg: DictConfig | None,
    module: ScoreModule,
    num: int,
    labels: Tensor | None = None,
    data: Any = None,
) -> Label:
    """What a conditional model is told about `num` images: by the options `label` and `condition`, else by
    the `labels` int64 (num,) and by what `data`, the module whose test images they are, know of them; see
    `pictures`. Labels are int64 (num,)."""
    if (label := class_index(cfg.label, run_cfg)) is not None:
        check_label(module, label)
        labels = classes(label, num)
    if module.num_classes and labels is None and not module.dropout["label"]:
        raise ConfigError(
            f"The model was always told a class in training: give label=<0 to {module.num_classes - 1}>."
        )
    if not (getattr(module, "vector_dim", 0) or getattr(module, "condition_channels", 0)):
        return labels if module.num_classes else None
    module.condition_source = data  # None where the images are not the run's
    told = Told.of(cfg, run_cfg, module)(range(num))
    return told.without("label") if labels is None else told


def observed_of(path: str, num: int, shape: tuple[int, ...]) -> Tensor:
    """float64 (N, *shape): the first `num` measurements in an npz file whose arr_0 is (N, H, W, C), or (N,
    ...) where a measurement is no picture; floats in the units of the model, for which images are [-1, 1].

    Raises ConfigError for other types, shapes, and values that are no numbers.
    """
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            found = file["arr_0"]
    except (ValueError, KeyError, EOFError, OSError, TypeError, AttributeError) as error:
        raise ConfigError(f"observed={path}: give an npz file with an arr_0 of numbers ({error}).") from error
    if found.dtype.kind != "f":
        raise ConfigError(
            f"observed={path}: arr_0 is {found.dtype}; give floats in the model's units (images are [-1, 1])."
        )
    y = torch.from_numpy(found.astype(np.float64))[:num]
    y = y.movedim(-1, 1) if len(shape) == 3 and y.ndim == 4 else y
    if tuple(y.shape[1:]) != shape or not len(y):
        wanted = (shape[1], shape[2], shape[0]) if len(shape) == 3 else shape
        raise ConfigError(
            f"observed={path}: arr_0 is {found.shape}; what this operator gives of the model's images is (N, "
            f"{', '.join(map(str, wanted))})."
        )
    if not bool(y.isfinite().all()):
        raise ConfigError(f"observed={path}: arr_0 holds values that are no numbers.")
    return y
