"""A sweep by Ray Tune: ASHA on the Frechet distance, each trial a fresh process of lit_gen.

    pip install 'lit-gen[ray]'
    python scripts/ray_tune.py --trials 20 --folder runs/ray experiment=digits callbacks.quality.every=100

What is not an option goes to every trial's command line. On a cluster (`ray start`, then `--address auto`)
the folder must be one that all machines see. Resources of a trial: --cpus, --gpus.
"""

import argparse
import os
from pathlib import Path

from lit_gen.sweeps.trials import TrialStopped, intermediate, run_trial

SPACE = {"model.optimizer.lr": (1e-4, 2e-2), "model.loss.P_mean": (-2.0, 0.0)}


def train(config: dict, fixed: list[str], folder: Path) -> None:
    """One trial: reports every evaluation's distance to Ray, which ends the trial that is not worth it."""
    from ray import tune

    run, told = folder / tune.get_context().get_trial_id(), set()

    def watch() -> bool:
        for step, value in sorted(intermediate(run).items()):
            if step not in told:
                told.add(step)
                tune.report({"fd": value, "batches": step})  # a stopped trial's process is ended here
        return False

    overrides = [*fixed, *(f"{key}={value!r}" for key, value in config.items())]
    final = run_trial(overrides, run, watch=watch)
    watch()
    if final is None:
        raise TrialStopped(f"{run} has no Frechet distance.")
    tune.report({"fd": final, "batches": max(told, default=0) + 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/ray"))
    parser.add_argument("--cpus", type=float, default=1)
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--address", default=None, help="of a Ray cluster; default: this machine alone")
    options, fixed = parser.parse_known_args()

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import tune

    ray.init(address=options.address, include_dashboard=False, log_to_driver=False)
    (a, b), (low, high) = SPACE.values()
    space = dict(zip(SPACE, (tune.loguniform(a, b), tune.uniform(low, high)), strict=True))
    trainable = tune.with_parameters(train, fixed=fixed, folder=options.folder.resolve())
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": options.cpus, "gpu": options.gpus}),
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=options.trials,
            scheduler=tune.schedulers.ASHAScheduler(
                time_attr="batches", metric="fd", mode="min", max_t=10**9, grace_period=1
            ),
        ),
        run_config=tune.RunConfig(storage_path=str((options.folder / "tune").resolve())),
    )
    best = tuner.fit().get_best_result("fd", "min")
    print("best fd", best.metrics["fd"])
    print("python -m lit_gen.train", *fixed, *(f"{key}={value!r}" for key, value in best.config.items()))


if __name__ == "__main__":
    main()
