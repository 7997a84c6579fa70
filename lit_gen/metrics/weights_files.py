"""Finding and downloading the published weights of extractors; the failure says where they were sought and
what to do.
"""

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_gen.errors import ConfigError


@dataclass(frozen=True)
class Published:
    """Weights that others published: `what` they are, the names their file goes by, its address and the start
    of its sha256; `instead`: what else the user can do without them.
    """

    what: str
    files: Sequence[str]
    url: str
    sha256_prefix: str
    size: str
    instead: str = (
        "choose the embedded extractor lit_gen.metrics.digits64, whose fd_digits64_... is not comparable "
        "with published numbers"
    )


def find_weights(published: Published, weights: str | Path | None = None) -> tuple[Path, str]:
    """The file and its sha256: `weights`, or from the folder $LITGEN_WEIGHTS, torch hub's cache, the net.

    A file found by its published name must have the published hash; one given as `weights` may be any, its
    hash names it.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ConfigError(f"weights={weights} is no file. It should hold {published.what}.")
        return path, sha256_of(path)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for path in _candidates(published, cache):
        if path.is_file():
            digest = sha256_of(path)
            if not digest.startswith(published.sha256_prefix):
                raise ConfigError(
                    f"{path} is damaged: its sha256 starts with {digest[:8]}, not {published.sha256_prefix}. "
                    "Delete it, or give the file that you mean as weights=<path>."
                )
            return path, digest
    path = cache / published.files[0]
    try:
        return path, _download(published, path)
    except OSError as error:
        raise ConfigError(_absent(published, cache, error)) from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _candidates(published: Published, cache: Path) -> list[Path]:
    own = os.environ.get("LITGEN_WEIGHTS")
    if own and not Path(own).is_dir():
        raise ConfigError(f"LITGEN_WEIGHTS={own} is no folder of weights under their published names.")
    return [folder / name for folder in ([Path(own)] if own else []) + [cache] for name in published.files]


def _download(published: Published, path: Path) -> str:
    """Streams the file to its place by rename; returns its sha256. The environment's proxies count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with urllib.request.urlopen(published.url, timeout=10) as answer:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                while block := answer.read(1 << 20):
                    digest.update(block)
                    file.write(block)
            if not digest.hexdigest().startswith(published.sha256_prefix):
                raise OSError(f"what {published.url} sent has another sha256 than the published file")
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    return digest.hexdigest()


def _absent(published: Published, cache: Path, error: OSError) -> str:
    own = os.environ.get("LITGEN_WEIGHTS") or "<unset>"
    return (
        f"This metric needs {published.what} ({' or '.join(published.files)}, {published.size}). "
        f"Looked in: weights=<unset>, $LITGEN_WEIGHTS={own}, {cache} (absent); "
        f"{published.url} could not be downloaded ({error}). "
        f"Copy the file to one of these places, or {published.instead}."
    )
