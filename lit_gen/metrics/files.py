"""Reference statistics that others published, and the records that our own numbers are kept in.

No such file says which network, resize or number of images made it, so the reader must be told.
"""

import io
import math
import pickle
import platform
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gen import __version__
from lit_gen.errors import ConfigError
from lit_gen.images import DTYPES
from lit_gen.metrics.distributed import world_size
from lit_gen.metrics.extractors import Extractor, ExtractorId
from lit_gen.metrics.functional import Estimate, Moments, moments

__all__ = ["holds_statistics", "read_images", "read_reference", "records"]

LIMIT = 2 << 30  # bytes in an array of such a file: 50k x 2048 float32 are 0.4 GB, a zip bomb is more
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def read_reference(
    path: str | Path, extractor: ExtractorId, *, n: int, resize: str, section: str = "fid"
) -> Moments:
    """Moments from a statistics file of TTUR, pytorch-fid, EDM, clean-fid or guided-diffusion (npz), or EDM2
    (pkl).

    An npz holds `mu`, `sigma`, or clean-fid's `feats` (n, d). EDM2's pickle holds {section: {mu, sigma}},
    section `fid` or `fd_dinov2`. `n` is the number of images and `resize` the resize that made the file; it
    must be the extractor's. Nothing in the file is executed. Raises ConfigError for a file that is missing,
    unreadable, or of another resize or number of features.
    """
    path = Path(path)
    if resize != extractor.resize:
        raise ConfigError(
            f"{path} was made with resize={resize}, the extractor uses {extractor.resize}: their distance "
            "would mean nothing. Take the statistics of the same resize, or the extractor of the other."
        )
    if not path.is_file():
        raise ConfigError(f"There is no reference file {path}.")
    try:
        arrays = _read_pickle(path, section) if path.suffix == ".pkl" else _read_npz(path)
        found = _moments(arrays, n)
    except UNREADABLE as error:
        raise ConfigError(f"{path} cannot be read as reference statistics: {error}") from error
    if found.d != extractor.d:
        raise ConfigError(f"{path} has {found.d} features, {extractor} gives {extractor.d}.")
    return found


def holds_statistics(path: str | Path) -> bool:
    """Whether an npz holds moments or features, and not images alone; nothing is unpacked. Raises
    ConfigError for a file that cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).stem for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return {"mu", "sigma"} <= names or "feats" in names


def read_images(path: str | Path) -> torch.Tensor:
    """The images (N, C, H, W), uint8, uint16, or float32, of an npz whose first array, arr_0, is (N, H, W, C)
    as guided-diffusion and lit_gen write it. Raises ConfigError for anything else.
    """
    try:
        arrays = _read_npz(Path(path), wanted=("arr_0",))
    except UNREADABLE as error:
        raise ConfigError(f"{path} cannot be read as images: {error}") from error
    images = arrays.get("arr_0")
    if images is None or images.dtype.name not in DTYPES or images.ndim != 4:
        found = "no arr_0" if images is None else f"arr_0 of {images.dtype} {images.shape}"
        raise ConfigError(f"{path} should hold arr_0, {' or '.join(DTYPES)} (N, H, W, C); it has {found}.")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _moments(arrays: dict[str, np.ndarray], n: int) -> Moments:
    if "mu" in arrays and "sigma" in arrays:
        mu, sigma = (torch.from_numpy(np.asarray(arrays[k], np.float64)) for k in ("mu", "sigma"))
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError("its numbers are not finite")
        if not torch.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * float(sigma.abs().max())):
            raise ValueError("sigma is not symmetric")
        return Moments(n, mu, (sigma + sigma.T) / 2)
    if "feats" in arrays:
        features = torch.from_numpy(np.asarray(arrays["feats"]))
        if len(features) != n:
            raise ValueError(f"it holds the features of {len(features)} images, n={n} was given")
        return moments(features)
    raise ValueError(f"it holds {sorted(arrays)}, neither mu and sigma nor feats")


def _read_npz(path: Path, wanted: tuple[str, ...] = ("mu", "sigma", "feats")) -> dict[str, np.ndarray]:
    """The wanted arrays of those that are there; sizes are checked before anything is unpacked."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        names = {Path(entry.filename).stem: entry for entry in archive.infolist()}
        for name in wanted:
            if name not in names:
                continue
            if names[name].file_size > LIMIT:
                raise ValueError(f"{name} would unpack to {names[name].file_size} bytes")
            with archive.open(names[name]) as file:
                arrays[name] = np.lib.format.read_array(io.BytesIO(file.read(LIMIT)), allow_pickle=False)
        if not arrays:
            raise ValueError(f"it holds {sorted(names)}, not {' or '.join(wanted)}")
    return arrays


ARRAY_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}


class _Arrays(pickle.Unpickler):
    """Containers and numpy arrays; every other name in the stream is refused before it is called."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy.core", "numpy._core")  # as numpy 1 wrote it
        if (module, name) not in ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module, name)


def _read_pickle(path: Path, section: str) -> dict[str, np.ndarray]:
    if path.stat().st_size > LIMIT:
        raise ValueError(f"it has {path.stat().st_size} bytes")
    with open(path, "rb") as file:
        content = _Arrays(file).load()
    if not isinstance(content, dict) or not isinstance(content.get(section), dict):
        there = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"it has no section {section!r} but {there}")
    return content[section]


def records(
    results: dict[str, Estimate],
    extractor: Extractor,
    *,
    n_real: int,
    n_fake: int,
    reference: str,
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """Each of `compare`'s results with all that it depends on, as JSON can hold it; `reference` says against
    which set, split and transform. A value that does not exist (NaN: a class without images) is None."""
    versions = {"lit_gen": __version__, "torch": torch.__version__, "torchvision": version("torchvision")}
    versions |= {"numpy": np.__version__, "python": platform.python_version()}
    pixels = extractor.pixels
    shared = {
        "n_real": n_real,
        "n_fake": n_fake,
        "extractor": asdict(extractor.id),
        "reference": reference,
        "seed": seed,
        "quantization": "uint8, floor(clamp(127.5 x + 128, 0, 255))" if pixels.are_bytes else str(pixels),
        "world_size": world_size(),
        "versions": versions,
    }
    return [
        {"key": key, "value": value if math.isfinite(value) else None, "se": se} | shared
        for key, (value, se) in results.items()
    ]
