"""What is seen and heard of the study: a row a word."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lit_gen.data.sound import save_wav
from lit_gen.figures import restoration_sheet, save
from lit_gen.hearing.study import Arm, Study
from lit_gen.score.module import ScoreModule

SHOWN = {"silence": (Arm(), 1), "noise": (Arm("white", 10), 2), "told": (Arm(listener="told"), 1)}
"""Name -> arm, number of restorations."""
PEAK = 0.9  # of the loudest sound of a word; the others keep their levels beside it


def write_examples(
    study: Study, module: ScoreModule, words: Sequence[str], out: Path
) -> tuple[dict[str, Path], list[Path]]:
    """The sheet of the first trial of each word, its rows of some words, and their sounds: ({"sheet",
    "examples"}: PNG files, WAV files)."""
    first = {study.words[t.word]: i for i, t in reversed(list(enumerate(study.trials)))}
    chosen = [first[word] for word in study.words if word in first]
    columns = {"original": study.original[chosen]}
    sounds = {"original": [study.trials[i].wave for i in chosen]}
    for name, (arm, count) in SHOWN.items():
        if name != "told":
            heard = study.sounds(arm)
            columns[name], sounds[name] = study.heard(arm)[chosen], [heard[i] for i in chosen]
        made = study.restored(module, arm, chosen)
        for k in range(min(count, study.samples)):
            columns[f"{name}_restored_{k}"] = made[:, k]
            sounds[f"{name}_restored_{k}"] = list(study.sound.wave(made[:, k]).numpy())
    pictures = torch.stack(list(columns.values()), 1)[:, :, 0].clamp(-1, 1).numpy()
    rows = {study.words[study.trials[i].word]: pictures[row] for row, i in enumerate(chosen)}
    some = {word: rows[word] for word in rows if word in words}
    titles = [name.replace("_restored_", ",\nrestored ") for name in columns]
    files = {
        name: save(restoration_sheet(shown, titles), out / f"{name}.png")
        for name, shown in (("sheet", rows), ("examples", some))
        if shown
    }
    written = []
    for row, word in enumerate(rows):
        waves = {name: torch.from_numpy(np.ascontiguousarray(sounds[name][row])) for name in columns}
        loudest = max(float(wave.abs().max()) for wave in waves.values())
        for name, wave in waves.items() if word in some else ():
            file = out / "sounds" / f"{word}_{name}.wav"
            written.append(save_wav(wave * min(1.0, PEAK / loudest), file, study.sound.rate))
    return files, written
