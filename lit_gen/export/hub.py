"""Exported folders on the Hugging Face hub."""

from pathlib import Path
from types import ModuleType

from lit_gen.errors import ConfigError


def hub() -> ModuleType:
    """huggingface_hub. Raises ConfigError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            "push= needs huggingface_hub: pip install 'lit-gen[hub]'. Without push= the folder is written."
        ) from error
    return huggingface_hub


def check_repository(name: str) -> None:
    """Raises ConfigError for what is no name of a repository, before anything is written."""
    owner, slash, repository = name.partition("/")
    if not (owner and slash and repository) or "/" in repository:
        raise ConfigError(f"push={name}: name a repository as owner/name.")
    hub()


def push(folder: Path, name: str, private: bool) -> str:
    """Uploads the folder as one commit into the repository, which is made, private or not, if there is none.
    Returns its address. Raises ConfigError where the hub refuses."""
    api = hub().HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Export by lit_gen")
    except Exception as error:  # of requests in one version of huggingface_hub, of httpx in the next
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"push={name}: the hub refused ({type(error).__name__}: {reason}). {folder} is complete: after "
            f"`hf auth login`, upload it with `hf upload {name} {folder}`."
        ) from error
    return str(address)
