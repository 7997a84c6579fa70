"""A trained model as a folder that others load."""

import os
import shutil
from pathlib import Path

from omegaconf import DictConfig

from lit_gen.cli import entry_point
from lit_gen.errors import ConfigError, check_choice
from lit_gen.export import hub
from lit_gen.export.card import CARD, write_card
from lit_gen.export.diffusers import write_diffusers
from lit_gen.export.programs import write_onnx, write_torch_export
from lit_gen.export.source import Write, open_source
from lit_gen.export.weights import write_safetensors

FORMATS: dict[str, Write] = {
    "safetensors": write_safetensors,
    "diffusers": write_diffusers,
    "torch_export": write_torch_export,
    "onnx": write_onnx,
}


def export(cfg: DictConfig) -> Path:
    """Writes the model and its card into the folder `cfg.out`, whole or not at all, and uploads it to
    `cfg.push` if that is given. Raises ConfigError for a folder that holds something, and for a model that
    the format cannot hold."""
    check_choice("format", cfg.format, tuple(FORMATS))
    out = Path(cfg.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} exists and is not empty: choose another folder.")
    if cfg.push is not None:
        hub.check_repository(cfg.push)
    source = open_source(cfg)
    place = out.resolve()  # also of a link, and of "."
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be made: {error.strerror}.") from error
    try:
        usage = FORMATS[cfg.format](source, part)
        told = {"license": cfg.license, "data_license": cfg.data_license}
        write_card(source, part, usage, name=place.name, pushed=cfg.push, **told)
        for file in part.rglob("*.safetensors"):  # which safetensors lets its writer alone read
            shutil.copymode(part / CARD, file)
        if place.exists():
            place.rmdir()
        part.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{source.path} -> {out}, format={cfg.format}, {size / 2**20:,.1f} MiB")
    print(f"how to load it: {out}/README.md")
    if cfg.push is not None:
        print(f"uploaded to {hub.push(out, cfg.push, cfg.private)}")
    return out


main = entry_point("export")(export)

if __name__ == "__main__":
    main()
