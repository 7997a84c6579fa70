"""Types of the top-level configuration nodes: a misspelt key or `trainer.max_steps=abc` is refused when the
command is typed."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

__all__ = ["register"]


@dataclass
class TrainerSchema:
    """Arguments of `lightning.pytorch.Trainer`; others can be added with `+trainer.<name>=`."""

    _target_: str = "lightning.pytorch.Trainer"
    accelerator: str = "auto"
    devices: Any = 1
    num_nodes: int = 1
    strategy: Any = "auto"
    precision: str = "auto"  # bf16-mixed on a GPU that has it, else 32-true
    max_steps: int = MISSING
    max_time: Any = None
    gradient_clip_val: float | None = None
    accumulate_grad_batches: int = 1
    deterministic: Any = False
    benchmark: bool | None = None
    profiler: Any = None
    plugins: Any = None


@dataclass
class MetricsSchema:
    """What a model is measured by: an extractor of Frechet distances, a classifier of the samples, the
    training of a translator's classifiers; and the score that selects the best checkpoint and that sweeps
    optimize, where `mode` (min or max) says which values are better."""

    extractor: Any = None
    classifier: Any = None
    classifiers: Any = None
    objective: str | None = None
    mode: str = "min"


@dataclass
class TrainSchema:
    name: str = MISSING
    seed: int = 0
    log_every: int = 50
    resume: str | None = None
    allow_targets: list[str] = field(default_factory=list)
    data: Any = MISSING
    model: Any = MISSING
    sampler: Any = None
    metrics: MetricsSchema = field(default_factory=MetricsSchema)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    trainer: TrainerSchema = field(default_factory=TrainerSchema)


@dataclass
class SampleSchema:
    run: str | None = None
    weights: str | None = None
    image_size: int | None = None
    model: Any = None
    checkpoint: str = "best"
    ema: bool = True
    num: int = 64
    first: int = 0
    seed: int = 0
    label: int | None = None
    batch_size: int = 256
    grid: int = 64
    format: str = "png"
    precision: str | None = None
    device: str | None = None
    devices: Any = "auto"
    guidance: Any = None
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING
    sampler: Any = None


@dataclass
class RestoreSchema:
    run: str | None = None
    weights: str | None = None
    image_size: int | None = None
    model: Any = None
    checkpoint: str = "best"
    ema: bool = True
    images: str = "test"
    num: int = 8
    samples: int = 4
    operator: Any = None
    mask: str = "center"
    noise_std: float = 0.0
    method: Any = None
    seed: int = 0
    label: int | None = None
    lpips: str | None = None
    batch_size: int = 64
    precision: str | None = None
    device: str | None = None
    devices: Any = "auto"
    guidance: Any = None
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING


@dataclass
class TranslateSchema:
    run: str | None = None
    weights: str | None = None
    checkpoint: str = "last"
    ema: bool = True
    content: str = "source"
    num: int = 8
    classes: str = "target"
    k: int | None = None
    image_size: int | None = None
    fit: str = "crop"
    interpolate: int = 0
    seed: int = 0
    batch_size: int = 64
    device: str | None = None
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING


@dataclass
class ClassifySchema:
    run: str = MISSING
    checkpoint: str = "last"
    ema: bool = True
    num: list[int] = field(default_factory=list)
    shots: int = 1
    splits: int = 5
    seed: int = 0
    features: str | None = None
    weight_decay: float = 1e-3
    batch_size: int = 64
    device: str | None = None
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING


@dataclass
class EncodeSchema:
    run: str | None = None
    weights: str | None = None
    image_size: int | None = None
    model: Any = None
    checkpoint: str = "best"
    ema: bool = True
    images: str = "test"
    num: int = 8
    interpolate: int = 8
    rtol: float = 1e-5
    atol: float = 1e-5
    label: int | None = None
    batch_size: int = 64
    device: str | None = None
    devices: Any = "auto"
    guidance: Any = None
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING


@dataclass
class SuggestSchema:
    data: Any = MISSING
    num: int = 5000
    seed: int = 0
    sigma_min: float = 0.02
    overlap: float = 0.5
    steps_per_level: int = 5
    allow_targets: list[str] = field(default_factory=list)
    out: str | None = None


@dataclass
class AverageSchema:
    run: str = MISSING
    std: float = MISSING
    batch: int | None = None
    checkpoint: str = "last"
    out: str | None = None


@dataclass
class MeasuringSchema:
    """What every evaluation of images reads."""

    reference: str | None = None
    reference_n: int | None = None
    reference_resize: str | None = None
    reference_section: str = "fid"
    training: str | None = None
    image_size: int | None = None
    fit: str = "crop"
    extractor: Any = None
    measures: list[str] = field(default_factory=list)
    per_class: bool = False
    max_stored_features: int = 10_000
    k: int = 5
    num: int | None = None
    batch_size: int = 256
    device: str | None = None
    devices: Any = "auto"
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING


@dataclass
class EvaluateSchema(MeasuringSchema):
    run: str = MISSING
    nll_images: int = 0
    t_min: float | None = None
    elbo_images: int = 0
    checkpoint: str = "best"
    ema: bool = True
    seed: int = 1
    precision: str | None = None
    guidance: Any = None
    sampler: Any = None


@dataclass
class EvaluateImagesSchema(MeasuringSchema):
    images: str = MISSING
    reference: str | None = MISSING


@dataclass
class EvaluateTranslationSchema:
    run: str = MISSING
    k: Any = 5
    extractor: Any = None
    classifiers: dict[str, str] = field(default_factory=dict)
    inception: str | None = None
    vgg: str | None = None
    lpips: str | None = None
    on_error: str | None = None
    checkpoint: str = "best"
    ema: bool = True
    num: int = 250
    seed: int = 1
    batch_size: int = 256
    device: str | None = None
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING


@dataclass
class CompareSchema:
    runs: list[str] = MISSING
    names: list[str] | None = None
    checkpoint: str = "best"
    ema: bool = True
    num: int | None = None
    seed: int = 1
    sampler: Any = None
    extractor: Any = None
    measures: list[str] = field(default_factory=list)
    max_stored_features: int = 10_000
    k: int = 5
    grid: int = 36
    batch_size: int = 256
    precision: str | None = None
    device: str | None = None
    devices: Any = "auto"
    wandb: str = "auto"
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING


@dataclass
class PreviewSchema:
    data: Any = None
    images: str | None = None
    boxes: list[Any] = field(default_factory=list)
    image_size: int | None = None
    num: int = 1
    columns: int = 8
    rows: int = 8
    fed: int = 32
    scale: int = 0
    seed: int = 0
    wandb: str = "auto"
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING


@dataclass
class SearchSchema:
    data: Any = None
    space: Any = MISSING
    strategy: Any = MISSING
    reward: Any = MISSING
    name: str = "search"
    seed: int = 0
    budget: int = 100
    top: int = 3
    control: bool = True
    randaugment: bool = False
    seeds: int = 1
    compare: dict[str, Any] = field(default_factory=dict)
    test_children: int = 3
    workers: int = 0
    storage: str | None = None
    join: bool = False
    wandb: str = "auto"
    allow_targets: list[str] = field(default_factory=list)
    out: str = MISSING


@dataclass
class ReportSchema:
    run: str = MISSING
    out: str | None = None
    grids: int = 12


def register() -> None:
    """Makes the schemas known to Hydra as `<entry point>_schema`."""
    store = ConfigStore.instance()
    nodes = {
        "train": TrainSchema,
        "sample": SampleSchema,
        "restore": RestoreSchema,
        "encode": EncodeSchema,
        "translate": TranslateSchema,
        "fewshot_classify": ClassifySchema,
        "suggest_noise": SuggestSchema,
        "average": AverageSchema,
        "evaluate": EvaluateSchema,
        "evaluate_images": EvaluateImagesSchema,
        "evaluate_translation": EvaluateTranslationSchema,
        "compare": CompareSchema,
        "report": ReportSchema,
        "preview": PreviewSchema,
        "search": SearchSchema,
    }
    for name, node in nodes.items():
        store.store(name=f"{name}_schema", node=node)
