"""Model names, folders and hub ids, and what is asked of huggingface_hub; the hub itself is never reached."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from causallm.hub import download, resolve_model

Calls = list[dict[str, Any]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What snapshot_download is called with; it makes a folder with a config.json."""
    made: Calls = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        made.append({"repo_id": repo_id, **options})
        folder = Path(options["local_dir"] or tmp_path / "cache")
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_folders_and_what_looks_like_one_never_reach_the_hub(tmp_path: Path, calls: Calls) -> None:
    for name in ("Qwen", "Qwen/Qwen3", "here"):
        (tmp_path / name).mkdir()
    for name in (
        "Qwen/Qwen3",
        "Qwen/missing",
        "here",
        "missing",
        "./missing",
        "../a",
        "a/b/c",
        "/no/such",
        "here/x.bin",
    ):
        assert resolve_model(name) == Path(name)
    assert calls == []


def test_a_hub_id_is_fetched_with_its_revision(tmp_path: Path, calls: Calls) -> None:
    assert resolve_model("owner/na.me-1_x") == tmp_path / "cache"
    assert resolve_model("owner/name", "v1.0") == tmp_path / "cache"
    assert [(call["repo_id"], call["revision"], call["local_dir"]) for call in calls] == [
        ("owner/na.me-1_x", None, None),
        ("owner/name", "v1.0", None),
    ]


def test_a_gguf_file_of_a_repository_is_fetched_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def hf_hub_download(repo_id: str, filename: str, revision: str | None = None) -> str:
        made.append((repo_id, filename, revision))
        return str(tmp_path / "cache" / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name/a.Q4_0.gguf", "v1") == tmp_path / "cache" / "a.Q4_0.gguf"
    (tmp_path / "here").mkdir()
    for name in ("here/models/a.gguf", "owner/a.gguf", "a.gguf", "./owner/name/a.gguf"):
        assert resolve_model(name) == Path(name)
    assert made == [("owner/name", "a.Q4_0.gguf", "v1")]


def test_a_gguf_file_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hf_hub_download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"cannot fetch owner/name/a.gguf from the Hugging Face hub.*no network"):
        resolve_model("owner/name/a.gguf")


def test_only_what_a_model_needs_is_fetched(calls: Calls) -> None:
    resolve_model("owner/name")
    wanted = [
        "config.json",
        "generation_config.json",
        "nntr_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
    ]
    others = [
        "README.md",
        "pytorch_model.bin",
        "original/params.json",
        "original/consolidated.00.pth",
        "metal/model.safetensors",
        "onnx/config.json",
        "model.gguf",
        "consolidated.safetensors",
        "flax_model.msgpack",
    ]
    patterns = {name: calls[0][name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + others, **patterns)) == wanted


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--revision is for hub ids of the form OWNER/NAME, got "):
        resolve_model(str(tmp_path), "main")


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no connection\nand nothing cached"),
        OSError("no connection\nand nothing cached"),
        RuntimeError("no connection\nand nothing cached"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_says_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    failing(monkeypatch, error)
    message = r"^cannot fetch no-such-owner/name from the Hugging Face hub .*: no connection and nothing cached$"
    with pytest.raises(ValueError, match=message):
        resolve_model("no-such-owner/name")


def test_offline_in_earnest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"^cannot fetch no-such-owner/name from the Hugging Face hub .*disabled"):
        resolve_model("no-such-owner/name")


def test_offline_a_folder_with_nothing_but_its_nntr_config_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub then returns any folder that is not empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nntr_config.json").write_text(json.dumps({"hf_repo": "no-such-owner/name"}))
    with pytest.raises(ValueError, match=r"has no config.json: the hub cannot be reached, or no-such-owner/name is"):
        download(str(tmp_path))


def test_download_goes_where_it_is_asked_to(tmp_path: Path, calls: Calls) -> None:
    (tmp_path / "res").mkdir()
    (tmp_path / "res" / "nntr_config.json").write_text(json.dumps({"hf_repo": "owner/name"}))
    asked: list[tuple[Callable[[], Path], str, Any]] = [
        (lambda: download("res"), "owner/name", Path("res")),
        (lambda: download("res", "elsewhere", "v2"), "owner/name", Path("elsewhere")),
        (lambda: download("other/model", "elsewhere"), "other/model", Path("elsewhere")),
        (lambda: download("other/model"), "other/model", None),
    ]
    for work, repo, folder in asked:
        assert work() == (folder or tmp_path / "cache")
        assert (calls[-1]["repo_id"], calls[-1]["local_dir"]) == (repo, folder)
    assert [call["revision"] for call in calls] == [None, "v2", None, None]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, ValueError, "has no nntr_config.json with hf_repo"),
        ("{}", ValueError, "has no nntr_config.json with hf_repo"),
        ('{"hf_repo": ', ValueError, r"nntr_config.json:1: broken JSON"),
    ],
)
def test_download_of_a_folder_that_names_no_repository(
    tmp_path: Path, content: str | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "nntr_config.json").write_text(content)
    with pytest.raises(error, match=message):
        download(str(tmp_path))


def test_download_of_nothing_says_what_was_expected(calls: Calls) -> None:
    with pytest.raises(
        FileNotFoundError, match="there is no folder missing, and it is no hub id of the form OWNER/NAME"
    ):
        download("missing")
    assert calls == []
