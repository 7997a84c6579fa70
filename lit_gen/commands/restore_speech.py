"""Phonemic restoration: words with a piece cut out, in silence and in noise, restored by score models."""

import signal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from lit_gen import __version__
from lit_gen.cli import check_at_least_1, entry_point, show, table
from lit_gen.data.sound import LogMel, sound_of, spoken_words
from lit_gen.errors import ConfigError, Exit
from lit_gen.figures import restoration_curve, save
from lit_gen.hearing.examples import write_examples
from lit_gen.hearing.judges import Judges
from lit_gen.hearing.study import ARMS, Arm, Study, summarized
from lit_gen.hearing.trials import speech_spectrum, trials
from lit_gen.instantiate import config_dict
from lit_gen.loggers import close, wandb
from lit_gen.models.loading import load
from lit_gen.runs import read_json, summary, write_json
from lit_gen.score.module import ScoreModule
from lit_gen.sweeps.trials import run_trial

DEPENDS = ("runs", "train", "families", "takes", "judge_takes", "samples", "num_steps")
"""Options that measurements depend on; more `runs`, `seeds`, and `conditions` only add to them."""
INTERRUPTED = 128 + signal.SIGINT


def restore_speech(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Measures every arm with every model, and writes `cells/`, `results.json` (of all cells that are there),
    `curve.png`, `sheet.png` (a row a word: the original, silence and what was heard in it, noise and two
    restorations, and the restoration of a listener who is told of the gap), `examples.png` (its rows of the
    words of `sounds`), and `sounds/`. What is there is not done again.

    Raises ConfigError for runs that are not of spoken words, and if `out` holds what other options gave.
    """
    check_at_least_1(cfg, "takes", "judge_takes", "samples", "num_steps", "unconditional", "batch_size")
    arms = _arms(cfg.conditions)
    _check_same(config_dict(cfg), out)
    try:
        runs = _runs(cfg, out)
        first, run_cfg = _model(runs[0], cfg.device)
        study = _study(cfg, run_cfg, out)
        samples = []
        for seed, run in enumerate(runs):
            module = cache(lambda run=run: _model(run, cfg.device)[0])
            samples.append(study.unconditional(seed, module, cfg.unconditional))
            for arm in arms:
                cell = study.cell(arm, seed, module)
                print(f"model {seed}, {arm.name}: piece {np.mean(cell['piece']):.3f}", flush=True)
    except KeyboardInterrupt:
        raise Exit(INTERRUPTED, f"Stopped; the same command with out={out} goes on with it.") from None
    result = {
        "arms": summarized(study.cells(), study),
        "samples": samples,
        "words": list(study.words),
        "families": [list(f) for f in study.families],
        "trials": len(study.trials),
        "voices": len({t.voice for t in study.trials}),
        "models": [str(run) for run in runs],
        "judges": _judged(study),
        "settings": config_dict(cfg),
        "version": __version__,
    }
    write_json(out / "results.json", result)
    files = {"curve": save(restoration_curve(result["arms"]), out / "curve.png")}
    sheets, sounds = write_examples(study, first, list(cfg.sounds), out)
    files |= sheets
    _log(cfg, out, result, files, sounds)
    return result


def _check_same(settings: dict[str, Any], out: Path) -> None:
    """Raises ConfigError if `out` holds measurements that depend on other options; else notes these."""
    now = {name: settings[name] for name in DEPENDS}
    before = read_json(out / "settings.json") or now
    known, given = before["runs"], now["runs"]
    if known and given and known[: len(given)] == given[: len(known)]:
        before["runs"] = now["runs"] = max(known, given, key=len)
    for name in DEPENDS:
        if before[name] != now[name]:
            raise ConfigError(
                f"{out} holds what {name}={before[name]} gave, and {name} is now {now[name]}: choose "
                "another out=."
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", now)


def _arms(given: Any) -> list[Arm]:
    if given == "all":
        return ARMS
    known = {arm.name: arm for arm in ARMS}
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(f"conditions: there is no {unknown[0]!r}; they are {'; '.join(known)}.")
    return [known[name] for name in given]


def _runs(cfg: DictConfig, out: Path) -> list[Path]:
    if cfg.runs:
        return [Path(run) for run in cfg.runs]
    check_at_least_1(cfg, "seeds")
    runs = []
    for seed in range(cfg.seeds):
        folder = out / f"model_{seed}"
        if not summary(folder):
            print(
                f"Training model {seed + 1} of {cfg.seeds}: {folder}/output.log tells how far it is",
                flush=True,
            )
            again = [f"resume={folder}"] if list(folder.glob("checkpoints/*.ckpt")) else []
            run_trial(["experiment=words", f"seed={seed}", *cfg.train, *again], folder)
        runs.append(folder)
    return runs


def _model(run: Path, device: str | None) -> tuple[ScoreModule, DictConfig]:
    module, run_cfg, _ = load(run, "last", device=device)
    if not isinstance(module, ScoreModule) or module.num_classes:
        raise ConfigError(f"runs: {run} is no score model without classes; train one by experiment=words.")
    return module, run_cfg


def _study(cfg: DictConfig, run_cfg: DictConfig, out: Path) -> Study:
    data, sound = run_cfg.data, sound_of(run_cfg.data)
    if sound is None or "words" not in data:
        raise ConfigError("runs: they are no models of spoken words; train them by experiment=words.")
    words, rate = list(data.words), (int(data.rate[0]), int(data.rate[1]))
    families = [list(family) for family in cfg.families]
    if missing := [word for family in families for word in family if word not in words]:
        raise ConfigError(f"families: the model has not learned {missing[0]!r}; leave its family out.")
    if unknown := [word for word in cfg.sounds if word not in words]:
        raise ConfigError(
            f"sounds: the model has not learned {unknown[0]!r}; its words are {', '.join(words)}."
        )
    said = {"sound": sound, "rate": rate, "seed": int(data.seed)}
    judging = trials(words, "judge", takes=cfg.judge_takes, **said)
    judges = _judges(judging, sound, len(words), out)
    prior = spoken_words(words, "train", takes=2, **said)
    return Study(
        words,
        families,
        trials(words, "test", takes=cfg.takes, **said),
        (prior.images, prior.labels if prior.labels is not None else torch.zeros(0)),
        judges,
        sound,
        speech_spectrum([t.wave for t in judging[:: len(words)]], sound),
        out,
        sigma_data=float(OmegaConf.select(run_cfg, "model.precondition.sigma_data") or 0.5),
        num_steps=cfg.num_steps,
        samples=cfg.samples,
        batch_size=cfg.batch_size,
    )


def _judges(judging: Any, sound: LogMel, classes: int, out: Path) -> Judges:
    """Trained once, kept in `out`."""
    file = out / "judges.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        return Judges.restored(state, classes)
    print(f"Training the judges on {len(judging)} words", flush=True)
    judges = Judges.trained(judging, sound, classes)
    part = file.with_suffix(".part")
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"whole": judges.whole.state_dict(), "piece": judges.piece.state_dict()}, part)
    part.replace(file)
    return judges


def _judged(study: Study) -> dict[str, float]:
    """How well the judges do on the originals of the test."""
    whole, piece = study.judges.say(study.original, study.gap)
    words = torch.tensor([t.word for t in study.trials])
    return {
        name: (p.argmax(1) == words).float().mean().item() for name, p in (("word", whole), ("piece", piece))
    }


def _log(
    cfg: DictConfig, out: Path, result: dict[str, Any], files: dict[str, Path], sounds: list[Path]
) -> None:
    columns = [
        "",
        "models",
        "piece, completable",
        "piece, all",
        "word, all",
        "error in gap",
        "level error",
        "two samples differ",
        "heard as stop",
    ]
    rows = []
    for name, found in result["arms"].items():
        row = [
            name,
            str(len(found["piece"]["by_model"])),
            _percent(found["piece"]["completable"]),
            _percent(found["piece"]["all"]),
            _percent(found["word"]["all"]),
        ]
        row += [_decibels(found[m]["all"]) for m in ("error_db", "level_db", "differ_db")]
        rows.append([*row, _percent(found["as_stop"]["all"])])
    logger = wandb(str(out), name="restore-speech", mode=cfg.wandb)
    try:
        logger.log_hyperparams(result["settings"])
        logger.log_table("speech/arms", columns=columns, data=rows)
        for name, file in files.items():
            logger.log_image(f"speech/{name}", [str(file)])
        if sounds:
            logger.log_audio("speech/sounds", [str(s) for s in sounds], caption=[s.stem for s in sounds])
    finally:
        close([logger])
    title = f"{result['trials']} words, {len(result['models'])} models given; ± standard error over words"
    for i, drawn in enumerate(result["samples"]):
        print(f"model {i}: sure of {100 * drawn['confident_fraction']:.0f} % of {drawn['n']} samples")
    show(table(title, columns, rows), f"written to {out}")


def _percent(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{100 * found['mean']:.0f} ± {100 * (found['se_words'] or 0):.0f} %"


def _decibels(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['mean']:.1f} ± {found['se_words'] or 0:.1f} dB"


main = entry_point("restore_speech")(lambda cfg: restore_speech(cfg, Path(cfg.out)))

if __name__ == "__main__":
    main()
