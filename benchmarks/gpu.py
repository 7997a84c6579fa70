"""What a GPU makes of lit_gen: training steps, sampling, FUNIT, augmentation, the FID pass, a short training.

    python benchmarks/gpu.py [--minutes 8] [--out gpu_benchmark] [--data <folder with CIFAR-10>]
    python benchmarks/gpu.py --device cpu --tiny                  # the same program, tried without a GPU

Needs no network, nor Hydra. Training steps, sampling, FUNIT, augmentation: torch, torchvision and Lightning.
FID pass: also safetensors. Training: also scikit-learn, or CIFAR-10 (EDM's zips or torchvision's folder). A
section that misses a package says which and is left out. `gpu.json` and `gpu.md` in `--out` are written whole
after every row, so that a kill keeps what was measured. Times are medians, by CUDA events, after a warm-up;
the first call, which compiles, stands apart.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone that this file is in
from gpu_sections import (
    KINDS,
    Emit,
    Row,
    Setting,
    augmentation,
    fid_pass,
    funit,
    peak_of,
    sampling,
    short,
    training_steps,
)


def training(setting: Setting, deadline: float, emit: Emit) -> None:
    from gpu_training import train  # Lightning, and packages that a bare machine may lack

    train(setting, deadline, emit)


SECTIONS: dict[str, tuple[Callable[[Setting, float, Emit], None], float]] = {
    "training step of DDPM++": (partial(training_steps, "DDPM++"), 0.22),
    "training step of NCSN++": (partial(training_steps, "NCSN++"), 0.22),
    "sampling": (sampling, 0.16),
    "FUNIT's iteration": (funit, 0.06),
    "Policy.apply_batch": (augmentation, 0.02),
    "FID pass": (fid_pass, 0.04),
    "training on real images": (training, 0.28),
}
"""With their shares of the time; what one leaves is the next one's."""


def benchmark(setting: Setting, seconds: float, out: Path, sections: Any = SECTIONS) -> Row:
    """Runs the sections; the record, of which the files are written anew after every row."""
    out.mkdir(parents=True, exist_ok=True)
    begun, share, record = time.monotonic(), 0.0, about(setting) | {"sections": {}}
    for name, (section, part) in sections.items():
        print(f"\n## {name}", flush=True)
        share += part
        here = record["sections"][name] = {"rows": [], "remarks": []}
        start = time.monotonic()

        def emit(what: Row | str, here: Row = here) -> None:
            here["remarks" if isinstance(what, str) else "rows"].append(what)
            print(what if isinstance(what, str) else _line(what), flush=True)
            save(record, out)

        try:
            section(setting, begun + share * seconds, emit)
        except ModuleNotFoundError as error:
            here["skipped"] = f"needs the package {error.name}"
            print(f"left out: {here['skipped']}", flush=True)
        except Exception as error:  # whatever it is: recorded, and the next section goes on
            here["error"] = f"{type(error).__name__}: {short(error)}"
            print(here["error"], flush=True)
        here["seconds"] = round(time.monotonic() - start, 1)
        setting.clean()
        save(record, out)
    return record


def about(setting: Setting) -> Row:
    cuda = setting.cuda
    card = torch.cuda.get_device_name(setting.device) if cuda else platform.processor() or platform.machine()
    peaks = {kind: (peak_of(card, kind) or 0) / 1e12 or None for kind in KINDS}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    memory = torch.cuda.get_device_properties(setting.device).total_memory / 2**30 if cuda else None
    about = {"device": card, "memory GiB": memory, "peak TFLOP/s": peaks, "versions": versions}
    return about | {"tiny": setting.tiny, "command": shlex.join(["python", *sys.argv])}


def save(record: Row, out: Path) -> None:
    """Both files, each whole at any moment."""
    for name, text in (("gpu.json", json.dumps(record, indent=1) + "\n"), ("gpu.md", markdown(record))):
        part = out / f".{name}.part"
        part.write_text(text)
        part.replace(out / name)


def markdown(record: Row) -> str:
    """The record as tables."""
    lines = [
        f"# {record['device']}, torch {record['versions']['torch']}",
        "",
        f"`python {record['command']}`",
    ]
    if record["tiny"]:
        lines += ["", "A try at tiny sizes: these numbers say nothing."]
    for name, section in record["sections"].items():
        lines += ["", f"## {name}", ""]
        if columns := list(dict.fromkeys(key for row in section["rows"] for key in row)):
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            for row in section["rows"]:
                lines.append(f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |")
            lines.append("")
        lines += [f"- {remark}" for remark in section["remarks"]]
        lines += [f"- {kind}: {section[kind]}" for kind in ("skipped", "error") if kind in section]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "n/a" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(row: Row) -> str:
    return ", ".join(f"{key} {_cell(value)}" for key, value in row.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="for all sections; compilers may overrun it")
    parser.add_argument("--out", type=Path, default=Path("gpu_benchmark"), help="folder of the results")
    parser.add_argument("--data", type=Path, default=os.environ.get("LITGEN_DATA"), help="with CIFAR-10")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the program")
    parser.add_argument("--tiny", action="store_true", help="sizes of a try")
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "There is no CUDA device: nothing was measured. To try the program without one:\n"
            "python benchmarks/gpu.py --device cpu --tiny"
        )
        return 2
    device = torch.device(given.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current one
    torch.backends.cudnn.benchmark = True  # as in the recipes: shapes are fixed
    data = given.data and Path(given.data)
    benchmark(Setting(device, given.tiny, data), 60 * given.minutes, given.out)
    print(f"\n{(given.out / 'gpu.md').read_text()}\nwritten to {given.out / 'gpu.json'} and gpu.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
