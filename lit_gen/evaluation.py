"""What a trained model is worth: the table and the JSON record of `python -m lit_gen.evaluate`."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lit_gen import __version__, runs
from lit_gen.callbacks.quality import uint8_batches
from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png
from lit_gen.instantiate import instantiate
from lit_gen.metrics import FeatureStatistics, frechet_distance, reference_moments
from lit_gen.sampling import sample_images

__all__ = ["evaluate"]


def evaluate(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Samples as `cfg` says, measures them with the extractor of the run's own `callbacks.quality`, writes
    `out/evaluation.json` and `out/grid.png`, prints the table and returns the record.

    Raises ConfigError for a run without a measure, besides what `runs.load` raises.
    """
    allow = list(cfg.allow_targets)
    module, run_cfg, path = runs.load(cfg.run, cfg.checkpoint, ema=cfg.ema, allow=allow, device=cfg.device)
    quality = run_cfg.callbacks.get("quality")
    if not quality:
        raise ConfigError(
            f"{cfg.run} was trained without a measure: it has no callbacks.quality (train with metrics=...)."
        )
    extractor = instantiate(quality.extractor, allow)
    classifier = instantiate(quality.classifier, allow) if quality.get("classifier") else None
    data = instantiate(run_cfg.data, allow)
    n = cfg.num or len(data.train)
    if n < 2:
        raise ConfigError(f"num={n}: a Frechet distance needs at least 2 samples.")
    sampler = instantiate(cfg.sampler, allow) if cfg.sampler else None

    reference, training = (_moments(data, split, extractor, cfg.batch_size) for split in ("test", "train"))
    start = time.perf_counter()
    images = sample_images(module, range(n), cfg.seed, cfg.batch_size, sampler, progress=True)
    seconds = time.perf_counter() - start
    statistics = FeatureStatistics(extractor.id.d)
    confident: list[torch.Tensor] = []
    for batch in images.split(cfg.batch_size):
        statistics.update(extractor(batch))
        if classifier is not None:
            p, classes = classifier.with_logits(batch)[1].softmax(1).max(1)
            confident.append(classes[p > 0.9])
    record = {
        "checkpoint": str(path),
        "key": extractor.id.key("fd", n),
        "fd": frechet_distance(reference, statistics.compute()),
        "fd_floor": frechet_distance(reference, training),
        "extractor": str(extractor.id),
        "n_real": reference.n,
        "n_fake": n,
        "seed": cfg.seed,
        "sampler": str(cfg.sampler or run_cfg.sampler),
        "samples_per_second": n / seconds,
        "versions": {"lit_gen": __version__, "torch": torch.__version__},
    }
    if classifier is not None:
        sure = torch.cat(confident)
        record |= {"confident_share": len(sure) / n, "classes_found": len(sure.unique())}
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    save_png(grid(images[:64], scale=max(1, 64 // images.shape[-1])), out / "grid.png")
    _print(record, out)
    return record


def _moments(data: Any, split: str, extractor: Any, batch_size: int) -> Any:
    dataset = data.dataset(split)
    return reference_moments(
        lambda: uint8_batches(dataset, batch_size),
        extractor,
        data=dataset.fingerprint(),
        split=split,
        n=len(dataset),
    )


def _print(record: dict[str, Any], out: Path) -> None:
    table = Table(show_header=False, title=record["checkpoint"])
    table.add_row(record["key"], f"{record['fd']:.4f}")
    table.add_row("  floor (training split against test split)", f"{record['fd_floor']:.4f}")
    if "confident_share" in record:
        table.add_row(
            "samples that the classifier is sure of (p > 0.9)", f"{100 * record['confident_share']:.1f} %"
        )
        table.add_row("classes found", str(record["classes_found"]))
    table.add_row("samples/s", f"{record['samples_per_second']:.0f}")
    console = Console()
    console.print(table)
    console.print(f"written to {out}", soft_wrap=True, highlight=False)
