"""A run, a sweep, or a policy search as one HTML file that needs nothing else."""

from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader
from omegaconf import DictConfig, OmegaConf

from lit_gen import __version__, runs
from lit_gen.cli import check_at_least_1, entry_point
from lit_gen.errors import ConfigError
from lit_gen.reporting.drawings import finite
from lit_gen.reporting.parts import Section
from lit_gen.reporting.run import of_run
from lit_gen.reporting.sweep import logs_of, of_search, of_sweep, trials_of


def report(cfg: DictConfig) -> Path:
    """Writes the report of `cfg.run` and returns its path. Raises ConfigError for what is no run, sweep, or
    policy search, and without plotly."""
    folder = Path(cfg.run)
    check_at_least_1(cfg, "grids")
    for name in ("trajectories", "sheets"):
        if cfg[name] < 0:
            raise ConfigError(f"{name}={cfg[name]}: must be at least 0.")
    if not folder.is_dir():
        raise ConfigError(f"run={cfg.run}: there is no such folder.")
    out = Path(cfg.out) if cfg.out else folder / "report.html"
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder: name a file.")
    title, sections = _told(folder, cfg)
    environment = Environment(
        loader=PackageLoader("lit_gen.reporting", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["finite"] = finite
    page = environment.get_template("page.html.j2").render(
        title=title,
        folder=str(folder.resolve()),
        sections=[s for s in sections if any(s[key] for key in s if key not in ("title", "columns"))],
        plotly=_plotly(),
        version=__version__,
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_whole(out, page)
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MiB)")
    return out


def _told(folder: Path, cfg: DictConfig) -> tuple[str, list[Section]]:
    """The title of the page and its sections."""
    options = {"grids": cfg.grids, "trajectories": cfg.trajectories, "sheets": cfg.sheets}
    if logs := logs_of(folder):
        if cfg.trajectories:
            raise ConfigError(f"trajectories={cfg.trajectories}: {folder} is a policy search, not a run.")
        settings = runs.saved_config(folder)
        told = {"title": "Configuration", "details": runs.yaml_text(OmegaConf.to_container(settings))}
        return f"policy search {settings.name}", [*of_search(folder, logs), told]
    if (folder / "config.yaml").is_file():
        return runs.saved_config(folder).name, of_run(folder, **options)
    if trials := trials_of(folder):
        return f"sweep {folder.name}", of_sweep(folder, trials, **options)
    raise ConfigError(f"{folder} is neither a run folder nor one of a sweep: it holds no config.yaml.")


def _plotly() -> str:
    """The source of plotly.js, which draws the figures in the reader's browser."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("A report needs plotly: pip install 'lit-gen[report]'.") from error
    return get_plotlyjs()


main = entry_point("report")(report)

if __name__ == "__main__":
    main()
