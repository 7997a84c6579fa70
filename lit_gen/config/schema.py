"""Types of the top-level configuration nodes: a misspelt key or `trainer.max_steps=abc` is refused when the
command is typed."""

import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from lit_gen.config.fitting import register_resolvers


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
    """With all defaults, because the configuration of an older run may lack what has been added since."""

    name: str = MISSING
    seed: int = 0
    log_every: int = 50
    resume: str | None = None
    weights: str | None = None
    weights_ema: bool = True
    introduction: str | None = None
    allow_targets: list[str] = field(default_factory=list)
    data: Any = MISSING
    model: Any = MISSING
    sampler: Any = None
    metrics: MetricsSchema = field(default_factory=MetricsSchema)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    trainer: TrainerSchema = field(default_factory=TrainerSchema)


@dataclass(kw_only=True)
class CommandSchema:
    """What every other command has. Defaults are in conf/<command>.yaml, of groups here."""

    allow_targets: list[str]
    out: str


@dataclass(kw_only=True)
class ModelSchema(CommandSchema):
    """A trained model, and how it is used."""

    checkpoint: str
    ema: bool
    batch_size: int
    device: str | None


@dataclass
class ConditionOptions:
    """What samples are told besides a class."""

    vector: Any = None
    image: str | None = None


@dataclass(kw_only=True)
class GeneratorSchema(ModelSchema):
    """A score model, its images divided among processes."""

    run: str | None
    weights: str | None
    image_size: Any
    model: Any = None
    guidance: Any = None
    label: Any
    condition: ConditionOptions
    num: int
    devices: Any


@dataclass(kw_only=True)
class SampleSchema(GeneratorSchema):
    first: int
    grid: int
    format: str
    precision: str | None
    sampler: Any = None
    seed: int


@dataclass(kw_only=True)
class RestoreSchema(GeneratorSchema):
    images: str
    observed: str | None
    samples: int
    operator: Any
    mask: str
    noise_std: Any
    method: Any
    lpips: str | None
    precision: str | None
    seed: int


@dataclass(kw_only=True)
class RestoreSpeechSchema(CommandSchema):
    runs: list[str]
    seeds: int
    train: list[str]
    families: list[Any]
    takes: int
    judge_takes: int
    samples: int
    num_steps: int
    unconditional: int
    conditions: Any
    sounds: list[str]
    batch_size: int
    device: str | None
    wandb: str


@dataclass(kw_only=True)
class EncodeSchema(GeneratorSchema):
    images: str
    interpolate: int
    rtol: float
    atol: float


@dataclass(kw_only=True)
class TranslateSchema(ModelSchema):
    run: str | None
    weights: str | None
    content: str
    num: int
    classes: str
    k: int | None
    image_size: Any
    fit: str
    interpolate: int
    adapt: int
    guidance: Any = None
    seed: int


@dataclass(kw_only=True)
class FewshotClassifySchema(ModelSchema):
    run: str
    num: list[int]
    shots: int
    splits: int
    features: str | None
    weight_decay: float
    seed: int


@dataclass(kw_only=True)
class SuggestNoiseSchema:
    allow_targets: list[str]
    out: str | None
    data: Any
    num: int
    seed: int
    sigma_min: float
    overlap: float
    steps_per_level: int


@dataclass(kw_only=True)
class AverageSchema:
    run: str
    std: float
    batch: int | None
    checkpoint: str
    out: str | None


@dataclass(kw_only=True)
class ConsolidateSchema:
    run: str
    checkpoint: str
    out: str | None


@dataclass(kw_only=True)
class ExportSchema(CommandSchema):
    run: str | None
    weights: str | None
    image_size: Any
    model: Any = None
    checkpoint: str
    ema: bool
    format: str
    license: str | None
    data_license: str | None
    push: str | None
    private: bool


@dataclass(kw_only=True)
class MeasuringSchema(CommandSchema):
    """Metrics of many images, computed by several processes."""

    extractor: Any = None
    measures: list[str]
    max_stored_features: int
    k: int
    num: int | None
    batch_size: int
    device: str | None
    devices: Any


@dataclass(kw_only=True)
class ReferenceSchema(MeasuringSchema):
    """What the images are measured against."""

    reference_n: int | None
    reference_resize: str | None
    reference_section: str
    training: str | None
    image_size: Any
    fit: str
    channels: int | None
    dtype: str | None
    range: list[float] | None
    per_class: bool


@dataclass(kw_only=True)
class EvaluateImagesSchema(ReferenceSchema):
    images: str
    reference: str


@dataclass(kw_only=True)
class SamplesSchema(MeasuringSchema):
    """Samples of runs that are measured."""

    checkpoint: str
    ema: bool
    seed: int
    precision: str | None
    sampler: Any = None


@dataclass(kw_only=True)
class EvaluateSchema(SamplesSchema, ReferenceSchema):
    run: str
    reference: str | None
    nll_images: int
    t_min: float | None
    elbo_images: int
    guidance: Any = None


@dataclass(kw_only=True)
class EvaluateTranslationSchema(ModelSchema):
    run: str
    k: Any
    extractor: Any = None
    classifiers: dict[str, str]
    inception: str | None
    vgg: str | None
    lpips: str | None
    on_error: str | None
    adapt: int
    guidance: Any = None
    num: int
    seed: int


@dataclass(kw_only=True)
class CompareSchema(SamplesSchema):
    runs: list[str]
    names: list[str] | None
    grid: int
    wandb: str


@dataclass(kw_only=True)
class CompareAugmentationSchema(CommandSchema):
    data: Any = None
    task: Any
    arms: dict[str, Any] = field(default_factory=dict)
    space: Any
    classifier: dict[str, Any]
    child: dict[str, Any]
    fill: int
    name: str
    shots: list[int]
    seed: int
    seeds: int
    held_out: float
    made: list[int]
    workers: int
    device: str | None
    wandb: str


@dataclass(kw_only=True)
class PreviewSchema(CommandSchema):
    data: Any = None
    images: str | None
    boxes: list[Any]
    image_size: Any
    num: int
    columns: int
    rows: int
    batch_images: int
    scale: int
    seed: int
    wandb: str


@dataclass(kw_only=True)
class DemoSchema:
    allow_targets: list[str]
    run: Any
    checkpoint: str
    ema: bool
    device: str | None
    port: int | None
    share: bool


@dataclass(kw_only=True)
class PrepareSchema(CommandSchema):
    data: Any = MISSING
    format: str
    workers: Any
    shard_mib: float
    encoder: str | None
    checkpoint: str
    ema: bool
    dtype: str
    images: bool
    batch_size: int
    device: str | None
    seed: int


@dataclass(kw_only=True)
class SearchSchema(CommandSchema):
    data: Any = None
    space: Any
    strategy: Any
    reward: Any
    name: str
    seed: int
    budget: int
    top: int
    random_baseline: bool
    randaugment: bool
    seeds: int
    compare: dict[str, Any]
    test_children: int
    workers: int
    storage: str | None
    worker: bool
    wandb: str


@dataclass(kw_only=True)
class ReportSchema:
    run: str
    out: str | None
    grids: int
    trajectories: int
    sheets: int


def _image_shape(channels: int, image_size: Any) -> list[int]:
    from lit_gen.images import height_and_width  # torch, which a command that only prints its help lacks

    return [channels, *height_and_width(image_size)]


def register() -> None:
    """Makes the schemas known to Hydra as `<entry point>_schema`, and to OmegaConf
    `${image_shape:<channels>,<image_size>}`, which is [C, H, W], and the resolvers of `fitting`."""
    OmegaConf.register_new_resolver("image_shape", _image_shape, replace=True)
    register_resolvers()
    for name, node in globals().items():
        if name.endswith("Schema"):
            known = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
            ConfigStore.instance().store(name=known, node=node)
