"""What the entry points share: where conf/ is, how a run folder is chosen, how errors are shown."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from lit_gen.config import schema
from lit_gen.errors import ConfigError, Exit
from lit_gen.instantiate import allowing


def _conf_dir() -> Path:
    package = Path(__file__).parent
    # Inside a wheel conf/ lies in the package, in a checkout (also an editable install) beside it.
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"lit_gen's conf/ lies neither in {package} nor beside it: the installation is incomplete."
    )


CONF_DIR = _conf_dir()


def is_main_process() -> bool:
    """Whether this process is rank 0, also before torch.distributed is up."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(r) for r in ranks if r is not None), 0) == 0


def entry_point(config_name: str) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """`hydra.main` with our conf/ and with errors as a user wants them: the user's mistakes as one message
    without a traceback and exit code 2, a stop by signal as 128 + its number, everything else as it is.

    `allow_targets` of the command line holds for everything that the command instantiates.
    """

    def decorate(body: Callable[[Any], Any]) -> Callable[[], None]:
        failures: list[Exception] = []

        @wraps(body)
        def kept(cfg: Any) -> Any:
            try:
                with allowing(OmegaConf.select(cfg, "allow_targets", default=())):
                    return body(cfg)
            except Exception as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise  # the launcher reports it
                if _users_mistake(error) is not None:
                    leave_nothing(Path(HydraConfig.get().runtime.output_dir))
                failures.append(error)  # raised below: Hydra would add a line of its own
                return None

        task = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(kept)

        @wraps(body)
        def run() -> None:
            failures.clear()
            schema.register()
            OmegaConf.register_new_resolver("run_folder", _run_folder, use_cache=True, replace=True)
            OmegaConf.register_new_resolver("run_out", _run_out, replace=True)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands the exception on instead of formatting it
            logging.captureWarnings(True)
            try:
                task()
                if failures:
                    raise failures[0]
            except Exception as error:
                if isinstance(error, Exit):
                    print(error, file=sys.stderr)
                    sys.exit(error.code)
                if message := _users_mistake(error):
                    print(f"lit_gen: {message}", file=sys.stderr)
                    sys.exit(2)
                traceback.print_exc()
                sys.exit(1)
            finally:
                logging.captureWarnings(False)

        return run

    return decorate


def check_at_least_1(cfg: DictConfig, *names: str) -> None:
    """Raises ConfigError for the first of these options that is below 1."""
    for name in names:
        if cfg[name] < 1:
            raise ConfigError(f"{name}={cfg[name]}: must be at least 1.")


def claim(out: Path, what: str, *patterns: str) -> None:
    """Makes the folder of a command's results. Raises ConfigError if it holds earlier ones, which are never
    written over: files that match a pattern."""
    if any(next(out.glob(pattern), None) for pattern in patterns):
        raise ConfigError(f"{out} already holds {what}: choose another out=.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be made: {error.strerror}.") from error


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of rich, its first column to the left; columns without names have no header."""
    made = Table(title=title, show_header=any(columns))
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def show(*parts: Any) -> None:
    """Prints tables of rich, and lines, which are not wrapped so that they can be copied."""
    console = Console()
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True, highlight=False)
        else:
            console.print(part)


def _users_mistake(error: BaseException | None) -> str | None:
    """The message of the innermost ConfigError, or of Hydra's or OmegaConf's complaint about what was typed;
    else None."""
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in reversed(chain):
        if isinstance(link, ConfigError):
            return str(link)
    for link in chain:
        if isinstance(link, OverrideParseException):
            return f"{link.override}: {link}".strip()
    if any("Config group override must be a string" in str(link) for link in chain):
        return "a group was given null: name one of its options, or leave the group out (~group)."
    typed = [link for link in chain if isinstance(link, HydraException)]
    typed += [link for link in chain if isinstance(link, OmegaConfBaseException)][:1]  # one wraps the next
    return ": ".join(_plainly(link) for link in typed) or None


def _plainly(error: BaseException) -> str:
    """What Hydra or OmegaConf says, without the lines that are for its developers."""
    where = getattr(error, "full_key", None)
    said = re.split(r"\n\s+(?:full_key: |object_type=|reference_type=)", str(error))[0].strip()
    if isinstance(error, MissingMandatoryValue):
        return f"{where} is missing: give {where}=..."
    if missing := re.search(r"Missing mandatory value: (\S+)", said):  # that another value is made of
        return f"{missing[1]} is missing: give {missing[1]}=..."
    if isinstance(error, InterpolationKeyError):
        return f"{said}: {where} takes its value from there, and this choice of groups has no such key."
    return said


def leave_nothing(folder: Path) -> None:
    """Removes the folder that Hydra made for a command that was refused, if it holds an empty log at most."""
    try:
        logs = [log for log in folder.glob("*.log") if log.name != "output.log"]  # that is a trial's
        if set(folder.iterdir()) == set(logs) and not any(log.stat().st_size for log in logs):
            for log in logs:
                log.unlink()
            while folder != Path.cwd():
                folder.rmdir()  # ends at the first that holds something else
                folder = folder.parent
    except OSError:
        pass


def _run_out(run: str | None) -> str:
    """Where the results of a run go: into its folder (of a checkpoint, the file's); without a run, here."""
    if not run:
        return "."
    from lit_gen.checkpoints import is_checkpoint

    return run if Path(run).is_dir() and not is_checkpoint(run) else str(Path(run).parent)


def _run_folder(resume: str | None, name: str) -> str:
    """Where a run lives: the folder that is resumed, else a new one under runs/<name>/."""
    if resume and resume != "auto":
        if not Path(resume).is_dir():
            raise ConfigError(f"resume={resume}: there is no run folder {resume}.")
        return resume
    if resume == "auto":
        earlier = sorted(Path("runs", name).glob("*/checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
        if earlier:
            return str(earlier[-1].parent.parent)
    return str(Path("runs", name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")))
