"""The pooling head of an embedding model, as the sentence-transformers files in its folder describe it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causallm.config.fields import Fields
from causallm.config.json_file import read_json, read_json_list

POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}

POOLING_FOLDER = "1_Pooling"


@dataclass(frozen=True)
class DenseConfig:
    """One linear layer after pooling; `folder` holds its weights, relative to the model's."""

    folder: str
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class PoolingConfig:
    """pooling: "cls", "mean", "max" or "last"."""

    pooling: str
    normalize: bool = True
    dense: tuple[DenseConfig, ...] = ()


def read_pooling(folder: Path) -> PoolingConfig | None:
    """What modules.json of `folder` says, None where there is no such file; ValueError for an unknown part."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    pooling, normalize, dense = "mean", False, []
    for entry in read_json_list(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise ValueError(f"{path}: expected a list of objects with a type, got {entry!r}")
        kind, part = entry["type"].rsplit(".", 1)[-1], entry.get("path", "")
        if kind == "Pooling":
            pooling = _pooling_mode(folder / part / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind == "Dense":
            dense.append(_dense(folder, part))
        elif kind != "Transformer":
            raise ValueError(
                f"{path}: unknown module '{entry['type']}', expected Transformer, Pooling, Dense, Normalize"
            )
    return PoolingConfig(pooling, normalize, tuple(dense))


def pooling_files(pooling: PoolingConfig) -> dict[str, Any]:
    """The JSON files, by their names in a model's folder, from which `read_pooling` reads a pooling without dense
    layers again."""
    parts = [("", "Transformer"), (POOLING_FOLDER, "Pooling"), *([("2_Normalize", "Normalize")] * pooling.normalize)]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(parts)
    ]
    flags = {key: mode == pooling.pooling for key, mode in POOLINGS.items()}
    return {"modules.json": modules, f"{POOLING_FOLDER}/config.json": flags}


def _pooling_mode(path: Path) -> str:
    content = read_json(path)
    # Newer files name the mode, older ones set one of several flags.
    chosen = [mode for key, mode in POOLINGS.items() if content.get(key)]
    if isinstance(content.get("pooling_mode"), str):
        chosen = [{"lasttoken": "last"}.get(content["pooling_mode"], content["pooling_mode"])]
    if len(chosen) != 1 or chosen[0] not in POOLINGS.values():
        raise ValueError(f"{path}: expected one of {', '.join(POOLINGS)} to be true")
    return chosen[0]


def _dense(folder: Path, part: str) -> DenseConfig:
    path = folder / part / "config.json"
    fields = Fields(read_json(path), str(path))
    activation = fields.text("activation_function", "torch.nn.modules.linear.Identity")
    if not activation.endswith("Identity"):
        raise ValueError(f"{path}: activation_function {activation} is not supported, only Identity")
    return DenseConfig(
        part, fields.integer("in_features"), fields.integer("out_features"), fields.boolean("bias", True)
    )
