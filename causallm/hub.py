"""Finding a model: a folder or file as it is, a hub id through huggingface_hub."""

import re
from pathlib import Path

from causallm.config import read_json

WANTED = ["*.json", "*.safetensors", "*.jinja"]
UNWANTED = ["original/*", "metal/*", "onnx/*", "openvino/*", "consolidated*"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")


def resolve_model(name: str, revision: str | None = None) -> Path:
    """The folder or file of a model: `name` itself, or what the hub has in huggingface_hub's cache.

    OWNER/NAME is a repository of the hub, OWNER/NAME/FILE.gguf a file in one, unless there is such a path here.
    """
    if _is_hub_id(name):
        return fetch(name, None, revision)
    file = HUB_FILE.fullmatch(name)
    if file and not Path(name).exists() and not Path(name.partition("/")[0]).is_dir():
        return fetch_file(file[1], file[2], revision)
    if revision is not None:
        raise ValueError(f"--revision is for hub ids of the form OWNER/NAME, got {name}")
    return Path(name)


def _is_hub_id(name: str) -> bool:
    """OWNER/NAME, unless that or OWNER is a folder here, in which case NAME is meant to be in it, or NAME a file's."""
    path = Path(name)
    named = HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf")
    return named and not path.is_dir() and not path.parent.is_dir()


def download(name: str, folder: str | None = None, revision: str | None = None) -> Path:
    """Fetch the model that a folder's nntr_config.json names in hf_repo into that folder, or a hub id into `folder`.

    Files that are there already and unchanged are not fetched again.
    """
    if _is_hub_id(name):
        return fetch(name, None if folder is None else Path(folder), revision)
    if not Path(name).is_dir():
        raise FileNotFoundError(f"there is no folder {name}, and it is no hub id of the form OWNER/NAME")
    config = Path(name) / "nntr_config.json"
    repo = read_json(config).get("hf_repo") if config.is_file() else None
    if not repo:
        raise ValueError(f"{name} has no nntr_config.json with hf_repo, so it is unknown what to fetch")
    return fetch(repo, Path(folder or name), revision)


def fetch(repo: str, folder: Path | None, revision: str | None = None) -> Path:
    """Fetch a hub repository's model files; ValueError in one line when the hub cannot be reached or refuses."""
    from huggingface_hub import snapshot_download

    try:
        fetched = Path(
            snapshot_download(
                repo, revision=revision, local_dir=folder, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        )
    except Exception as error:  # its HTTP client's own errors have no base in common with the hub's
        raise _unreachable(repo, error) from None
    if not (fetched / "config.json").is_file():
        # Offline, a folder that holds anything at all is taken for the whole repository.
        raise ValueError(f"{fetched} has no config.json: the hub cannot be reached, or {repo} is no model for this")
    return fetched


def fetch_file(repo: str, file: str, revision: str | None = None) -> Path:
    """Fetch one file of a hub repository; ValueError as `fetch`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # as in fetch
        raise _unreachable(f"{repo}/{file}", error) from None


def _unreachable(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"cannot fetch {name} from the Hugging Face hub (there is no such folder either): {reason[:300]}")
