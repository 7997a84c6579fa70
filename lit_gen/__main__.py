"""`lit-gen COMMAND ...` and `python -m lit_gen COMMAND ...`."""

import runpy
import sys

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": ("lit_gen.train", "Train an experiment, or resume a run."),
    "sample": ("lit_gen.commands.sample", "Sample images from a run or from official weights."),
    "evaluate": (
        "lit_gen.commands.evaluate",
        "Measure the samples of a run: metrics and likelihoods.",
    ),
    "evaluate-images": (
        "lit_gen.commands.evaluate_images",
        "Measure any images against a folder or statistics of others.",
    ),
    "evaluate-translation": (
        "lit_gen.commands.evaluate_translation",
        "Measure a few-shot translator by the protocol of the FUNIT paper.",
    ),
    "compare": (
        "lit_gen.commands.compare",
        "Compare runs: metrics with error bars, curves, the same seeds side by side.",
    ),
    "encode": ("lit_gen.commands.encode", "Encode images as latents, decode them, and interpolate."),
    "restore": ("lit_gen.commands.restore", "Restore degraded images: inpaint, colorize, upscale, deblur."),
    "translate": ("lit_gen.commands.translate", "Translate images into classes that a few images show."),
    "fewshot-classify": (
        "lit_gen.commands.fewshot_classify",
        "Classify unseen classes with translations as training images.",
    ),
    "preview": ("lit_gen.commands.preview", "Show what an augmentation does to images and boxes."),
    "search": ("lit_gen.commands.search", "Search for an augmentation policy."),
    "suggest-noise": ("lit_gen.commands.suggest_noise", "Suggest noise levels for a data set."),
    "average": ("lit_gen.commands.average", "Compute a post-hoc EMA of any length from stored averages."),
    "report": ("lit_gen.commands.report", "Write one HTML file about a run or a sweep."),
}
"""Command -> the module that runs it, and a line of help."""


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: lit-gen COMMAND [key=value ...]\n\n{rows}\n\nlit-gen COMMAND --help lists its options."


def main() -> None:
    """Runs the command's module as `python -m` would, so that the processes it starts find it again."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(_usage())
        return
    if command not in COMMANDS:
        print(f"lit-gen: there is no command {command!r}.\n\n{_usage()}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
