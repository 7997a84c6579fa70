"""Named files in a folder or in a zip, behind one interface, with untrusted zips refused.

`store.names` (sorted, "/"-separated), `store.read(name, first) -> bytes`, `store.signature(name) -> str`.
Nothing is ever unpacked to disk.
"""

import os
import re
import stat
import zipfile
from pathlib import Path, PurePosixPath

from lit_gen.errors import ConfigError

MAX_FILE = 256 << 20  # bytes one file may hold once unpacked
MAX_JSON = 1 << 30  # COCO's annotations are 450 MiB
MAX_RATIO = 200  # deflate reaches 1032:1 on zeros; pictures, lists and annotations stay below 50:1
SMALL = 1 << 20  # bytes below which no ratio is suspicious


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _limit(name: str) -> int:
    return MAX_JSON if name.lower().endswith(".json") else MAX_FILE


class FolderStore:
    """The files below a folder; hidden ones are left out, linked folders are followed once."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.names = sorted(self._walk())

    def _walk(self):
        seen: set[str] = set()
        for folder, below, files in os.walk(self.path, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back
                below.clear()
                continue
            seen.add(real)
            relative = Path(folder).relative_to(self.path)
            names = ((relative / file).as_posix() for file in files)
            yield from (name for name in names if not _is_hidden(name))

    def read(self, name: str, first: int | None = None) -> bytes:
        path = os.path.join(self.path, name)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > _limit(name):
                    raise ConfigError(
                        f"{path}: more than {_limit(name) >> 20} MiB, no picture or annotation."
                    )
                return file.readall() if first is None or size <= first else file.read(first)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error}).") from error

    def signature(self, name: str) -> str:
        try:
            status = os.stat(os.path.join(self.path, name))
        except OSError as error:
            raise ConfigError(f"{self.path / name}: cannot be read ({error.strerror or error}).") from error
        return f"{status.st_size}:{status.st_mtime_ns}"


class ZipStore:
    """The files in a zip, read in place; safe to pickle, to fork, and to read from several threads.

    Refused with a ConfigError: what is no zip or a truncated one, names that are absolute or climb out
    (`..`), links, encrypted files, packing other than deflate, and files that unpack to more than 256 MiB or
    200 times their size (zip bombs).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        self._pid = -1
        entries = [entry for entry in self._open().infolist() if not entry.filename.endswith("/")]
        for entry in entries:
            if why := _hostile(entry):
                raise ConfigError(
                    f"{self.path}: refused, its file {entry.filename!r} {why}. Pack it again from images you "
                    "trust."
                )
        self._sizes = {e.filename: (e.file_size, e.CRC) for e in entries if not _is_hidden(e.filename)}
        self.names = sorted(self._sizes)

    def _open(self) -> zipfile.ZipFile:
        # A handle that came through fork shares its file position with the parent: every process opens its
        # own.
        if self._zip is None or self._pid != os.getpid():
            try:
                self._zip, self._pid = zipfile.ZipFile(self.path), os.getpid()
            except Exception as error:  # zipfile lets struct.error, UnicodeDecodeError and more through
                raise ConfigError(
                    f"{self.path}: not a zip file, or a truncated one ({error}). Copy it again."
                ) from error
        return self._zip

    def read(self, name: str, first: int | None = None) -> bytes:
        if name not in self._sizes:
            raise ConfigError(f"{self.path}: has no file {name!r}.")
        archive = self._open()
        try:
            with archive.open(name) as file:
                # A bound, not read(): a stream that is longer than its entry says would unpack up to 2 GiB
                # first.
                whole = self._sizes[name][0] + 1
                return file.read(whole if first is None else min(first, whole))
        except Exception as error:
            raise ConfigError(f"{self.path}: {name} cannot be unpacked ({error}).") from error

    def signature(self, name: str) -> str:
        size, crc = self._sizes[name]
        return f"{size}:{crc:08x}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_zip": None, "_pid": -1}


Store = FolderStore | ZipStore


def open_store(path: str | os.PathLike) -> Store:
    """The store for a folder or a zip file. Raises ConfigError where `path` is neither."""
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderStore(path)
    if not path.exists():
        raise ConfigError(
            f"{path}: no such folder or zip file. Give the path of the data, absolute or from {Path.cwd()}."
        )
    return ZipStore(path)


def _hostile(entry: zipfile.ZipInfo) -> str:
    """Why an entry of a zip is refused; empty where it is not."""
    name, size, limit = entry.filename, entry.file_size, _limit(entry.filename)
    path = PurePosixPath(name.replace("\\", "/"))
    packed = entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    bomb = size > max(SMALL, MAX_RATIO * entry.compress_size)
    refused = {
        "has no name": not name,
        "leads out of the archive": path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name),
        "is a link": stat.S_ISLNK(entry.external_attr >> 16),
        "is encrypted": entry.flag_bits & 1,
        "is packed by another method than deflate": packed,
        f"unpacks to {size >> 20} MiB, more than {limit >> 20}: a zip bomb": size > limit,
        f"unpacks to more than {MAX_RATIO} times its size: a zip bomb": bomb,
    }
    return next((why for why, holds in refused.items() if holds), "")
