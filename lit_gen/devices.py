"""The commands that divide their images among processes, one a GPU: a plain call starts them (Lightning's
Fabric does), torchrun and srun have started them."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from torch import distributed as dist

from lit_gen.cli import leave_nothing
from lit_gen.errors import ConfigError
from lit_gen.metrics.distributed import from_rank_zero, rank, world_size

MAIN_PROCESS = "LITGEN_MAIN_PROCESS"  # names to the processes that a plain call starts the one they belong to


def divided(body: Callable[[DictConfig, Path], Any], cfg: DictConfig, images: int | None = None) -> None:
    """`body(cfg, out)` in one process for each of `cfg.devices`; `cfg.device` is that process's and `out` the
    same for all. The body divides its work by `own_batches` and writes on rank 0.

    `devices=auto` takes all GPUs, as many as there are batches of `images` at most, and without a GPU one
    process. Where one process fails, all end: it says why, the others are silent. Raises ConfigError for
    devices that are not there.
    """
    started = _started()
    local, nodes = started or (wanted(cfg, images), 1)
    if started and cfg.devices not in ("auto", local):
        raise ConfigError(f"devices={cfg.devices}: {local} processes were started on this machine.")
    if local * nodes == 1:
        body(cfg, Path(cfg.out))
        return
    fabric = _launched(cfg, local, nodes)
    try:
        cfg.device = str(fabric.device)
        cfg.out = from_rank_zero(lambda: str(cfg.out))
        own = Path(HydraConfig.get().runtime.output_dir)
        if rank() > 0 and own.resolve() != Path(cfg.out).resolve():
            leave_nothing(own)  # of this process's clock
        body(cfg, Path(cfg.out))
    except Exception as error:
        if not _is_first_failure():
            sys.exit(2 if isinstance(error, ConfigError) else 1)
        error.add_note(
            f"This was process {rank()} of {world_size()}. If it has lost the connection to another one, "
            "that one has said why above, or was killed, for memory perhaps."
        )
        raise
    if any(process.wait() for process in fabric.strategy.launcher.procs):
        sys.exit(1)  # one has said why


def undivided(what: str) -> None:
    """Raises ConfigError where torchrun or srun have started several processes for what one does."""
    if (started := _started()) and started != (1, 1):
        raise ConfigError(f"{what} is the work of one process: call it without torchrun or srun.")


def _started() -> tuple[int, int] | None:
    """(processes of each machine, machines) if torchrun or srun started this process."""
    if dist.is_torchelastic_launched():
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    elif (world := int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
        local = int(os.environ.get("SLURM_NTASKS_PER_NODE", world))
    else:
        return None
    return local, world // local


def wanted(cfg: DictConfig, images: int | None = None) -> int:
    """The number of processes that a plain call is to have."""
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    alone = _why_alone(device)
    if cfg.devices == "auto":
        batches = gpus if images is None else -(-images // max(1, cfg.batch_size))
        return 1 if alone else max(1, min(gpus, batches))
    if not isinstance(cfg.devices, int) or cfg.devices < 1:
        raise ConfigError(f"devices={cfg.devices}: must be auto or a number of processes, one a device.")
    if cfg.devices > 1 and alone:
        raise ConfigError(f"devices={cfg.devices}: {alone}.")
    if device == "cuda" and cfg.devices > gpus:
        raise ConfigError(
            f"devices={cfg.devices}: there are {gpus} GPUs; device=cpu takes processes of the CPU."
        )
    return cfg.devices


def _why_alone(device: str) -> str:
    """Why there cannot be more than one process; empty if there can."""
    if device not in ("cuda", "cpu"):
        return f"device={device} is one device"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return "each job of a sweep (-m) is one process"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith("lit_gen."):
        return "only a command, python -m lit_gen...., starts further processes; start yours by torchrun"
    return ""


def _launched(cfg: DictConfig, local: int, nodes: int) -> Any:
    """Fabric, with the other processes started and joined."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.fabric.strategies.ddp import DDPStrategy

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    launcher = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    launcher.setLevel(logging.INFO)  # says which process died
    launcher.addHandler(logging.StreamHandler())
    launcher.propagate = False
    if dist.is_torchelastic_launched():
        environment: Any = TorchElasticEnvironment()
    else:
        environment = SLURMEnvironment(auto_requeue=False) if _started() else LightningEnvironment()
    if os.environ.get(MAIN_PROCESS) == str(os.getppid()):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the main process alone speaks of Ctrl-C
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    else:
        os.environ[MAIN_PROCESS] = str(os.getpid())
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a process that loses the main one is silent
    cuda = (cfg.device or "cuda").startswith("cuda") and torch.cuda.is_available()
    try:
        fabric = Fabric(
            accelerator="cuda" if cuda else "cpu",
            devices=local,
            num_nodes=nodes,
            # Little is exchanged, and gloo fails at once where a process dies; the slowest is waited for.
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(days=7)),
            plugins=[environment],
        )
        fabric.launch()
    except ValueError as error:
        raise ConfigError(f"devices={cfg.devices}: {error}") from error
    return fabric


def _end_with(main: int) -> None:
    """Ends this process when the main one is gone, whatever it waits for."""
    while os.getppid() == main:
        time.sleep(0.5)
    if not reporting.is_set():
        os._exit(1)


reporting = threading.Event()


def _is_first_failure() -> bool:
    """Whether no other process has failed before."""
    reporting.set()
    try:
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    except Exception:  # the main process, which keeps the count, is gone
        return False
