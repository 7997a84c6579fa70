"""A configuration becomes objects by `_target_`, from packages that are allowed to be called."""

import functools
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from lit_gen.errors import ConfigError

ALLOWED = (
    "lit_gen.",
    "lightning.pytorch.",
    "torch.optim.",
    "torch.nn.",
    "torchmetrics.",
    "torchvision.datasets.",
    "torchvision.transforms.",
    "torchvision.models.",
)
"""Prefixes of what a configuration may name; `allowing`, which commands call with what
`allow_targets=[mine.]` lists, and $LITGEN_ALLOW_TARGETS (comma-separated) add more."""

_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())

HOMES = ("lightning.", "torchvision.")
"""Where what `ALLOWED` names may be defined, beside those packages themselves."""

MOVED = {
    "lit_gen.augment.search.": "lit_gen.search.",
    "lit_gen.data.restyle.RestyleStrokes": "lit_gen.data.strokes.StrokeAugment",
    "lit_gen.data.transforms.CentreCrop": "lit_gen.data.transforms.CenterCrop",
    "lit_gen.guiding.": "lit_gen.models.",
    "lit_gen.judging.": "lit_gen.evaluation.classifiers.",
    "lit_gen.evaluation.classifiers.Schooling": "lit_gen.evaluation.classifiers.ClassifierTraining",
    "lit_gen.restoring.": "lit_gen.inputs.",
    "lit_gen.search_tasks.": "lit_gen.search.tasks.",
    "lit_gen.search.tasks.grid": "lit_gen.search.Grid",
    "lit_gen.search.tasks.planted": "lit_gen.search.tasks.synthetic",
}
"""Prefixes of targets in configurations that earlier versions saved -> where the targets are now."""

RENAMED_KEYS: dict[str, dict[str, str]] = {
    "lit_gen.augment.Policy": {"faithful": "official"},
    "lit_gen.data.fewshot_module.": {"own_class_image": "same_class_target", "restyle": "content_augment"},
    "lit_gen.callbacks.SampleQuality": {"reservoir": "max_stored_features"},
    "lit_gen.callbacks.translations.Translations": {"judging": "classifiers"},
    "lit_gen.score.losses.": {"times": "noise_distribution", "pixels": "reduction"},
    "lit_gen.score.classifier.": {"times": "noise_distribution", "schedule": "lr_schedule"},
    "lit_gen.score.module.": {"schedule": "lr_schedule"},
    "lit_gen.funit.module.": {"schedule": "lr_schedule"},
    "lit_gen.detection.module.": {"schedule": "lr_schedule"},
}
"""Prefixes of targets, by their names of today -> {option of an earlier version: its name today}."""


def config_dict(node: Any) -> dict[str, Any]:
    """A mapping of a configuration as a dict of plain values, interpolations resolved. Raises OmegaConf's
    error for a value that is missing."""
    container = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def up_to_date(node: Any) -> Any:
    """A configuration, as plain containers, that an earlier version may have saved: its targets and their
    options by the names of today (`MOVED`, `RENAMED_KEYS`)."""
    if isinstance(node, list):
        return [up_to_date(value) for value in node]
    if not isinstance(node, dict):
        return node
    node = {key: up_to_date(value) for key, value in node.items()}
    for old, new in MOVED.items():
        if str(node.get("_target_", "")).startswith(old):
            node["_target_"] = new + node["_target_"].removeprefix(old)
    for prefix, keys in RENAMED_KEYS.items():
        if str(node.get("_target_", "")).startswith(prefix):
            renamed = {old: new for old, new in keys.items() if new not in node}
            node = {renamed.get(key, key): value for key, value in node.items()}
    return node


@contextmanager
def allowing(prefixes: Iterable[str]) -> Iterator[None]:
    """While it lasts, configurations may name targets that start with these prefixes too.

    It is for what the user of this process trusts, never for what a file says that it needs.
    """
    token = _trusted.set((*_trusted.get(), *prefixes))
    try:
        yield
    finally:
        _trusted.reset(token)


def trusted() -> tuple[str, ...]:
    """The prefixes of `allowing` where this is called, for what is instantiated later, or in another
    thread."""
    return _trusted.get()


def instantiate(node: Any, **kwargs: Any) -> Any:
    """`hydra.utils.instantiate` after every `_target_` has been looked at.

    Raises ConfigError for a target outside `ALLOWED`, `allowing` and $LITGEN_ALLOW_TARGETS.
    """
    extra = [p for p in os.environ.get("LITGEN_ALLOW_TARGETS", "").split(",") if p]
    prefixes = (*ALLOWED, *_trusted.get(), *extra)
    container = (
        OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig | ListConfig) else node
    )
    container = up_to_date(container)
    for _, part in _nodes(container):
        target = str(part.get("_target_"))
        if "_target_" in part and (not target.startswith(prefixes) or _leads_elsewhere(target, prefixes)):
            raise ConfigError(
                f"_target_ {target!r} is outside the packages that "
                f"a configuration may call ({', '.join(prefixes)}). "
                f"If you trust it, add allow_targets=[{target.split('.')[0]}.]"
            )
    # Plain lists and dicts: an optimizer puts what it is given into every checkpoint.
    try:
        _check_options(container)
        return hydra.utils.instantiate(_with_partials(container), _convert_="all", **kwargs)
    except InstantiationException as error:
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error.__cause__)):
            where = re.search(r"full_key: (\S+)", str(error))
            called = str(error.__cause__).split("(")[0]
            raise ConfigError(_no_option(called, unknown[1], where[1] if where else "")) from error
        raise


def _leads_elsewhere(target: str, prefixes: tuple[str, ...]) -> bool:
    """Whether the name reaches through an allowed module for what that module imported from another package
    (`lit_gen.cli.os.system`). What a user has allowed is trusted whole."""
    if not target.startswith(ALLOWED):
        return False
    home = getattr(hydra.utils.get_object(target), "__module__", None) or ""
    return not f"{home}.".startswith((*prefixes, *HOMES))


def _no_option(called: str, name: str, at: str) -> str:
    return (
        f"{at + ': ' if at else ''}{called} has no option {name!r}. Where an experiment sets it for another "
        "choice of the group (model=..., sampler=...), leave it out (~ before its key) or take an "
        "experiment of that family: experiment=digits_vp, for instance."
    )


def _nodes(node: Any, at: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """Every mapping in the container, with the dotted key where it stands."""
    if isinstance(node, dict):
        yield at, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield from _nodes(value, f"{at}.{key}" if at else str(key))


def _check_options(container: Any) -> None:
    """A function that is given `_partial_` is called later, in the middle of a training: options that it does
    not have are refused now.
    """
    for at, node in _nodes(container):
        if not (node.get("_partial_") and "_target_" in node):
            continue
        parameters = inspect.signature(hydra.utils.get_object(node["_target_"])).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        for name in node:
            if name not in parameters and not name.startswith("_"):
                raise ConfigError(_no_option(node["_target_"].rpartition(".")[2], name, at))


def _with_partials(node: Any, top: bool = True) -> Any:
    """The container with every `_partial_: true` node below its top as a `functools.partial`.

    Hydra's own partials look their target's permission up again at every call, which costs a training step
    half a millisecond each.
    """
    if isinstance(node, list):
        return [_with_partials(value, top=False) for value in node]
    if not isinstance(node, dict):
        return node
    node = {key: _with_partials(value, top=False) for key, value in node.items()}
    if top or not (node.get("_partial_") and "_target_" in node):
        return node
    arguments = {
        key: value for key, value in node.items() if key not in ("_target_", "_partial_", "_convert_")
    }
    arguments = hydra.utils.instantiate(arguments, _convert_="all")
    return functools.partial(hydra.utils.get_method(node["_target_"]), **arguments)
