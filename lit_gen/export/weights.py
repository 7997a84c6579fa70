"""`format=safetensors`: a folder that `lit_gen.load` and `run=` of every command read back to the bit."""

from pathlib import Path

from safetensors.torch import save_file

from lit_gen import __version__, runs
from lit_gen.export.source import Source, Usage, portable, tensors_of
from lit_gen.score.module import ScoreModule

KEPT = ("name", "seed", "data", "model", "sampler", "metrics")
"""What is kept of the configuration of a run."""


def write_safetensors(source: Source, folder: Path) -> Usage:
    """`model.safetensors`, the whole module's tensors; `config.json`; and what the model needs besides, such
    as the decoder of latents."""
    save_file(tensors_of(source.module), folder / runs.WEIGHTS, {"format": "pt"})
    source.module.keep_beside(folder)
    config = {key: source.config[key] for key in KEPT if key in source.config}
    record = {
        "library_name": runs.LIBRARY,
        "lit_gen_version": __version__,
        "averaged": source.averaged,
        "step": source.step,
        "run": runs.spelled(portable(config)),
    }
    runs.write_json(folder / runs.CONFIG, record)
    use = "images = model.sample(16, seed=0)  # uint8 (16, C, H, W)"
    if not isinstance(source.module, ScoreModule) or hasattr(source.module, "class_code"):
        use = "images = model.translate(content, classes)  # uint8 (N, C, H, W), of uint8 (K, C, H, W)"
    return Usage("lit_gen", f"import lit_gen\nmodel = lit_gen.load({{here}})\n{use}")
