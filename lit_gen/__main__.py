"""`lit-gen COMMAND ...` and `python -m lit_gen COMMAND ...`."""

import runpy
import sys

COMMANDS = {
    "train": "Train an experiment, or resume a run.",
    "sample": "Sample images from a run or from official weights.",
    "evaluate": "Measure the samples of a run: metrics and likelihoods.",
    "evaluate-images": "Measure any images against a folder or statistics of others.",
    "evaluate-translation": "Measure a few-shot translator by the protocol of the FUNIT paper.",
    "compare": "Compare runs: metrics with error bars, curves, the same seeds side by side.",
    "compare-augmentation": "Compare policies, GANs, and diffusion models as augmentation.",
    "encode": "Encode images as latents, decode them, and interpolate.",
    "restore": "Restore degraded images: inpaint, colorize, upscale, deblur.",
    "restore-speech": "Restore a piece of spoken words, in silence and in noise.",
    "translate": "Translate images into classes that a few images show.",
    "fewshot-classify": "Classify unseen classes with translations as training images.",
    "prepare": "Write a data set, or its latents, once, for training on any amount of data.",
    "preview": "Show what an augmentation does to images and boxes.",
    "demo": "Open a page that generates, restores, translates, augments, and compares.",
    "search": "Search for an augmentation policy.",
    "suggest-noise": "Suggest noise levels for a data set.",
    "average": "Compute a post-hoc EMA of any length from stored averages.",
    "export": "Write a model as a folder that others load, with a model card.",
    "consolidate": "Write the sharded checkpoint of a training by trainer=fsdp as one file.",
    "report": "Write one HTML file about a run or a sweep.",
}
"""Command -> a line of help."""


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
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
    module = "train" if command == "train" else f"commands.{command.replace('-', '_')}"
    runpy.run_module(f"lit_gen.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
