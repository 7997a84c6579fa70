"""One training on the workers of a Ray cluster, by Ray Train: as by torchrun, on machines that Ray chooses.

    pip install 'lit-gen[ray]'
    python scripts/ray_train.py --workers 2 --folder runs/ray/digits trainer=ddp_cpu
    python scripts/ray_train.py --workers 16 --gpus 1 --address auto --folder /shared/runs/mine \\
        experiment=cifar10_edm_vp trainer=fsdp

Each worker is one process of the training, whose command line is what is not an option. On several machines
the folder must be one that all of them see. After a failure all workers start again, --retries times at most,
and continue from the newest checkpoint; so does the same command typed again.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path


def work(config: dict) -> None:
    """One worker: `python -m lit_gen.train` in the environment that torchrun would have given it."""
    from ray import train, util
    from torch import distributed

    context = train.get_context()
    world, local = context.get_world_size(), context.get_local_world_size()
    with socket.create_server(("", 0)) as free:
        meet = [(util.get_node_ip_address(), free.getsockname()[1])]
    distributed.broadcast_object_list(meet)  # the first worker's
    environment = {
        "RANK": context.get_world_rank(),
        "LOCAL_RANK": context.get_local_rank(),
        "GROUP_RANK": context.get_node_rank(),
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": local,
        "MASTER_ADDR": meet[0][0],
        "MASTER_PORT": meet[0][1],
        "TORCHELASTIC_RUN_ID": "ray",
    }
    options = [f"trainer.devices={local}", f"trainer.num_nodes={world // local}"]
    options += [f"hydra.run.dir={config['folder']}", "resume=auto"]
    subprocess.run(
        [sys.executable, "-m", "lit_gen.train", *config["overrides"], *options],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cpus", type=float, default=1, help="of a worker")
    parser.add_argument("--gpus", type=float, default=0, help="of a worker")
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("--address", default=None, help="of a Ray cluster; default: this machine alone")
    options, overrides = parser.parse_known_args()

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address=options.address)
    folder = options.folder.resolve()
    trainer = TorchTrainer(
        work,
        train_loop_config={"folder": str(folder), "overrides": overrides},
        torch_config=TorchConfig(
            backend="gloo"
        ),  # for their first words; the training has a group of its own
        scaling_config=train.ScalingConfig(
            num_workers=options.workers,
            use_gpu=options.gpus > 0,
            resources_per_worker={"CPU": options.cpus} | ({"GPU": options.gpus} if options.gpus else {}),
        ),
        run_config=train.RunConfig(
            name="ray",
            storage_path=str(folder.parent),
            failure_config=train.FailureConfig(max_failures=options.retries),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
