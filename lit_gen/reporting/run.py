"""The sections of a run: its results, curves, pictures, augmentation, and configuration."""

from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from lit_gen import runs
from lit_gen.augment import Policy
from lit_gen.augment.sheet import policy_sheet
from lit_gen.data.images import pixels_of
from lit_gen.errors import ConfigError
from lit_gen.evaluation.samples import results_of, with_error
from lit_gen.images import grid, shown_channels
from lit_gen.instantiate import config_dict, instantiate
from lit_gen.models.loading import load
from lit_gen.reporting.drawings import Drawing, policy_table
from lit_gen.reporting.parts import Section, curves, drawn, frames, number, picture, sequence
from lit_gen.rng import keyed_generator
from lit_gen.score.module import ScoreModule

SIDE = 96  # pixels that the longer side of a small image is enlarged to at least in a policy sheet
LARGEST = 160  # pixels that it has at most


def of_run(folder: Path, grids: int, trajectories: int, sheets: int) -> list[Section]:
    """What there is to tell of a run. `grids`: pictures of each kind; `trajectories`: how many samples its
    model draws step by step, 0 for the frames that the training saved; `sheets`: drawings of its policy."""
    config, kinds = runs.saved_config(folder), _kinds(folder)
    results = [[name, number(value)] for name, value in runs.summary(folder).items() if name != "fd_name"]
    return [
        {"title": "Result", "table": results},
        {"title": "Evaluation", **_evaluation(folder)},
        {"title": "Curves", "plots": curves({"": runs.history(folder)})},
        {"title": "Pictures", **_pictures(kinds, grids)},
        {"title": "From noise to image", **_trajectories(folder, config, trajectories)},
        {"title": "Augmentation", **_augmentation(config, sheets)},
        {"title": "Environment", "details": runs.yaml_text(runs.read_json(folder / "environment.json"))},
        {"title": "Configuration", "details": runs.yaml_text(OmegaConf.to_container(config))},
    ]


def _evaluation(folder: Path) -> Section:
    """The newest of the run's evaluations."""
    file = next(iter(runs.evaluations(folder)), None)
    if file is None:
        return {}
    record = runs.read_json(file)
    rows = [[name, with_error(estimate)] for name, estimate, _ in results_of(record)]
    nearest = picture(file.parent / "nearest.png", "samples and the training images nearest to them")
    about = f"{record.get('n_fake')} samples, seed {record.get('seed')}, against {record.get('reference')}."
    if "contents" in record:
        about = f"{record['contents']} contents in {record['target_classes']} classes, seed {record['seed']}."
    return {"text": about, "table": rows, "pictures": [[nearest]] if nearest else []}


def _kinds(folder: Path) -> dict[str, list[Path]]:
    """The pictures of `grids/`, `<kind>_<batches>.png`, by kind and in order."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("grids/*.png")):
        kinds.setdefault(path.stem.rpartition("_")[0], []).append(path)
    return kinds


def _pictures(kinds: dict[str, list[Path]], grids: int) -> Section:
    shown = [sequence(paths, grids) for kind, paths in kinds.items() if kind != "trajectory"]
    text = "Always the same seeds; the slider goes back in the training."
    return {"text": text, "pictures": shown} if shown else {}


def _trajectories(folder: Path, config: DictConfig, num: int) -> Section:
    """Samples on their way out of noise, a frame a step, to go through with the slider."""
    if not num:
        paths = _kinds(folder).get("trajectory", [])
        node = (config.get("callbacks") or {}).get("grid") or {}
        most = node.get("frames", 10), max(node.get("trajectories", 4), 1)
        return {"pictures": [frames(paths[-1], *most)]} if paths else {}
    module, _, path = load(folder)
    if not isinstance(module, ScoreModule):
        raise ConfigError(f"trajectories={num}: {folder} is a run of {type(module).__name__}, not of noise.")
    all_steps = 1 << 20
    pair = [module.sample_trajectory(range(num), 0, all_steps, estimates=e) for e in (False, True)]
    captions = [f"step {k} of {pair[0].shape[1] - 1}" for k in range(pair[0].shape[1])]
    shown = [
        drawn(grid(shown_channels(torch.cat(frame), module.pixels.shown), num, scale=0), caption)
        for *frame, caption in zip(*(frames.unbind(1) for frames in pair), captions, strict=True)
    ]
    text = f"Seeds 0:0-{num - 1}, {path.name}: noisy images, and below them what the network expects of them."
    return {"text": text, "pictures": [shown]}


def _augmentation(config: DictConfig, sheets: int) -> Section:
    """The policy that the run trained with: its table, and what it does to the first training image."""
    node = (config.get("data") or {}).get("augment")
    if not node or not sheets:
        return {}
    try:
        policy = getattr(instantiate(config_dict(node)), "policy", None)
        if policy is None:
            return {}
        data = instantiate(config_dict(config.data))
        item = data.train[0]
        image = pixels_of(data.train).picture(item["image"])
    except (ConfigError, OSError, ImportError, InstantiationException) as error:
        return {"text": f"No sheet, since the training images cannot be read here: {error}"}
    options = {"scale": max(1, SIDE // max(image.shape[-2:])), "largest": LARGEST}
    drawings = [
        policy_sheet(policy, image, item.get("boxes"), generator=keyed_generator(k, "report"), **options)
        for k in range(sheets)
    ]
    captions = [f"the first training image, seed {k}" for k in range(sheets)]
    return {"plots": policy_plots(policy), "pictures": [[*map(drawn, drawings, captions)]]}


def policy_plots(policy: Any) -> list[Drawing]:
    """The sub-policies of a policy; none for an augmentation of another kind."""
    return [policy_table(policy.sub_policies)] if isinstance(policy, Policy) else []
