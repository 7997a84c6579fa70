"""The W&B workspaces of lit_gen's systems, as code.

    pip install wandb-workspaces
    python scripts/dashboards.py --entity me --project lit_gen                     # needs an account
    python scripts/dashboards.py --project lit_gen --system score --print          # the JSON, without one

Names are those of docs/dashboards.md; Frechet distances are found by their beginning, whatever network and
number of images they carry.
"""

import argparse

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

DISTANCES, KERNELS = "^(fd_|fid)", "^(kd_|kid)"
OTHERS = "^(precision|recall|density|coverage|authpct|is_|isc|fdinf|fdtrain|vendi|ct_)"


def line(title: str, *names: str, regex: str | None = None, log: bool = False) -> wr.LinePlot:
    return wr.LinePlot(title=title, x="trainer/global_step", y=list(names), metric_regex=regex, log_y=log)


def section(name: str, *panels) -> ws.Section:
    return ws.Section(name=name, panels=list(panels), is_open=True)


def resources() -> ws.Section:
    return section(
        "Speed and memory",
        line("images per second", "throughput/images_per_second"),
        line("peak memory (GiB)", "memory/peak_gib"),
    )


def score() -> list[ws.Section]:
    """Score models: distances first, then pictures, then what explains them."""
    quarters = [f"train/loss_noise_q{i}" for i in range(1, 5)]
    return [
        section(
            "Quality",
            line("Frechet distance", regex=DISTANCES, log=True),
            line("its standard error", regex="^se/(fd_|fid)"),
            line("kernel distance", regex=KERNELS),
            line("other measures", regex=OTHERS),
            wr.ScalarChart(title="final Frechet distance", metric="summary/fd", groupby_aggfunc="min"),
            line("confident fraction of the samples", "samples/confident_fraction"),
        ),
        section(
            "Pictures",
            wr.MediaBrowser(media_keys=["samples/grid"], num_columns=2),
            wr.MediaBrowser(media_keys=["samples/trajectory"], num_columns=1),
        ),
        section(
            "Training",
            line("loss", "train/loss", "val/loss", log=True),
            line("loss by quarter of the noise levels", *quarters, log=True),
            line("gradient norm", "train/grad_norm", log=True),
            line("learning rate", "train/lr"),
            line("EMA decay", "train/ema_decay"),
        ),
        resources(),
        section(
            "Sweeps",
            wr.ParallelCoordinatesPlot(
                columns=[
                    wr.ParallelCoordinatesPlotColumn(metric="c::model/optimizer/lr", log=True),
                    wr.ParallelCoordinatesPlotColumn(metric="c::data/batch_size"),
                    wr.ParallelCoordinatesPlotColumn(metric="summary/fd", log=True),
                ]
            ),
            wr.ParameterImportancePlot(with_respect_to="summary/fd"),
        ),
    ]


def funit() -> list[ws.Section]:
    """FUNIT: K-shot numbers, translations, and the balance of the two networks."""
    return [
        section(
            "Translation",
            line("class accuracy by K", regex="^k_shot/top1_"),
            line("distance to the true translation by K", regex="^k_shot/l1_"),
            line("content kept by K", regex="^k_shot/content_"),
            wr.MediaBrowser(media_keys=["samples/translations"], num_columns=1),
        ),
        section(
            "Balance",
            line("discriminator", "train/discriminator/real", "train/discriminator/fake"),
            line("who is fooled", "train/discriminator/accuracy", "train/generator/fooled"),
            line("gradient penalty", "train/discriminator/penalty", log=True),
        ),
        section(
            "Losses",
            line("totals", "train/generator/loss", "train/discriminator/loss"),
            line(
                "parts of the generator's",
                "train/generator/adversarial",
                "train/generator/reconstruction",
                "train/generator/class_features",
                "train/generator/content_features",
                log=True,
            ),
            line("gradient norms", "train/generator/grad_norm", "train/discriminator/grad_norm", log=True),
            line("learning rates", "train/generator/lr", "train/discriminator/lr"),
        ),
        resources(),
    ]


def detection() -> list[ws.Section]:
    """Detectors under augmentation policies."""
    return [
        section(
            "Precision",
            line("mean average precision", "val/map", "val/map50", "val/map75"),
            wr.MediaBrowser(media_keys=["samples/detections"], num_columns=2),
        ),
        section(
            "Training",
            line("loss", "train/loss", log=True),
            line("gradient norm", "train/grad_norm", log=True),
            line("learning rate", "train/lr"),
        ),
        resources(),
    ]


SYSTEMS = {"score": score, "funit": funit, "detection": detection}


def workspace(system: str, entity: str, project: str) -> ws.Workspace:
    return ws.Workspace(
        name=f"lit_gen: {system}",
        entity=entity,
        project=project,
        sections=SYSTEMS[system](),
        settings=ws.WorkspaceSettings(x_axis="trainer/global_step", smoothing_weight=0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entity", default="", help="a user or a team")
    parser.add_argument("--project", default="lit_gen")
    parser.add_argument("--system", choices=[*SYSTEMS, "all"], default="all")
    parser.add_argument("--print", action="store_true", dest="show", help="print the JSON, send nothing")
    options = parser.parse_args()
    for system in SYSTEMS if options.system == "all" else [options.system]:
        made = workspace(system, options.entity, options.project)
        if options.show:
            print(made._to_model().model_dump_json(indent=1))
        else:
            made.save()
            print(f"{system}: {made.url}")


if __name__ == "__main__":
    main()
