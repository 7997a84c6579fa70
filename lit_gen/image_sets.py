"""Sets of images that anybody made, by their path, and the statistics of sets whose images are elsewhere."""

from pathlib import Path
from typing import Any

from lit_gen.data.folders import ImageFiles
from lit_gen.data.images import TensorImages
from lit_gen.errors import ConfigError
from lit_gen.metrics import Extractor, Moments, read_images, read_reference
from lit_gen.metrics.files import holds_statistics

__all__ = ["classes_of", "open_images", "open_reference"]


def open_images(path: str | Path, image_size: int | None = None, fit: str = "crop") -> Any:
    """The images of a folder, of a zip, or of an npz whose arr_0 is uint8 (N, H, W, C), as a data set (the
    contract of `lit_gen.data.images`).

    With `image_size` pictures in files are brought to that size as `fit` says (`lit_gen.data.decode`);
    without it they must be square and of one size. Raises ConfigError.
    """
    path = Path(path).expanduser()
    if path.suffix == ".npz":
        if image_size is not None:
            raise ConfigError(
                f"image_size={image_size} resizes picture files; the arrays of {path} are taken as they are."
            )
        return TensorImages(read_images(path), name=path.stem)
    return ImageFiles(path, image_size=image_size, fit=fit, scan=False, draft=False)  # measured: exact


def open_reference(
    path: str | Path,
    extractor: Extractor,
    *,
    n: int | None = None,
    resize: str | None = None,
    section: str = "fid",
    image_size: int | None = None,
    fit: str = "crop",
) -> Moments | Any:
    """The moments in a statistics file (TTUR, pytorch-fid, EDM, EDM2, clean-fid, guided-diffusion), or the
    data set that `open_images` gives.

    A statistics file does not say how many images made it nor how they were resized: `n` and `resize` must.
    """
    path = Path(path).expanduser()
    if path.suffix != ".pkl" and not (path.suffix == ".npz" and holds_statistics(path)):
        if n is not None or resize is not None:
            raise ConfigError(f"reference_n and reference_resize describe a statistics file, {path} is none.")
        return open_images(path, image_size, fit)
    missing = [name for name, x in {"reference_n": n, "reference_resize": resize}.items() if x is None]
    if missing:
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
