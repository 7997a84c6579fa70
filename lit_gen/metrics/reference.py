"""A reference set's statistics, computed once and kept on disk under a key that holds all they depend on."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_gen.metrics.distributed import from_rank_zero
from lit_gen.metrics.evaluation import Evaluation, Summary

__all__ = ["cache_folder", "load_tensors", "reference_summary", "save_tensors"]

log = logging.getLogger(__name__)

Batch = tuple[Sequence[int], Tensor, Tensor | None]
"""Rows of a set of images: their numbers in it, the images, their labels."""

FORMAT = 3


def cache_folder() -> Path:
    """$LITGEN_CACHE, or lit_gen in $XDG_CACHE_HOME, or ~/.cache/lit_gen."""
    if own := os.environ.get("LITGEN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_gen"


def reference_summary(
    batches: Callable[[], Iterable[Batch]],
    evaluation: Evaluation,
    *,
    data: str,
    n: int,
    folder: Path | None = None,
) -> Summary:
    """The summary of a reference set, from the cache or, if absent there, by `evaluation` of `batches()`.

    `batches()` yields this rank's share of the set (`lit_gen.metrics.distributed.own_batches`): the rows'
    numbers in the whole set, their uint8 (B, C, H, W) images and their labels (B,) or None. Every rank must
    call. `data`, `n`, the number of images of all ranks, and what `evaluation` keeps by which extractor make
    the key: `data` must change when the images do (a content hash, or name and version).
    """
    key = {
        "data": data,
        "n": n,
        "max_stored_features": len(evaluation.index),
        "num_classes": len(evaluation.classes),
        "seed": evaluation.seed,
        "extractor": asdict(evaluation.extractor.id),
        "format": FORMAT,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    name = "".join(c if c.isalnum() else "-" for c in data)[:60]
    path = (folder or cache_folder() / "reference") / f"{name}-{digest}.safetensors"
    tensors = from_rank_zero(lambda: load_tensors(path, key))
    if tensors is None:
        for rows, images, label in batches():
            evaluation.update(images, torch.as_tensor(rows), label)
        summary = evaluation.summary()
        if summary.n != n:
            raise ValueError(
                f"The reference {data} was said to have {n} images, its batches gave {summary.n}."
            )
        tensors = from_rank_zero(lambda: _saved(path, key, summary.tensors()))
    return Summary.from_tensors(evaluation.extractor.id, tensors)


def save_tensors(path: Path, key: dict, tensors: dict[str, Tensor]) -> None:
    """Writes tensors and their key (any JSON) as safetensors, by rename: readers see all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    os.close(handle)
    try:
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        save_file(tensors, partial, metadata={"key": json.dumps(key, sort_keys=True)})
        os.chmod(partial, 0o644)  # a cache may be shared; mkstemp's file is its owner's alone
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def load_tensors(path: Path, key: dict) -> dict[str, Tensor] | None:
    """What `save_tensors` wrote under the same key; None, with a warning, if the file is damaged or
    another's.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata()["key"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if stored != json.dumps(key, sort_keys=True):
            raise ValueError("its key is another one")
        if not all(x.isfinite().all() for x in tensors.values()):
            raise ValueError("its numbers are not finite")
        return tensors
    except Exception as error:  # whatever is wrong with a cache file, the remedy is to compute again
        log.warning("Computing the reference statistics again: %s cannot be used (%s).", path, error)
        return None


def _saved(path: Path, key: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        save_tensors(path, key, tensors)
    except OSError as error:
        log.warning(
            "The reference statistics could not be kept in %s (%s); the next run needs them again.",
            path,
            error,
        )
    return tensors
