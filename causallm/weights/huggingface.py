"""Writing a Hugging Face model folder: safetensors in shards with an index, and the files that go with them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causallm.config import read_json
from causallm.config.model import ModelConfig
from causallm.weights.safetensors_reader import INDEX, SINGLE
from causallm.weights.safetensors_writer import write_safetensors
from causallm.weights.tensor_bytes import Advance

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
METADATA = {"format": "pt"}


def write_huggingface(
    target: Path,
    source: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
    advance: Advance | None = None,
) -> None:
    """Fill the empty folder `target` with weights under Hugging Face's names and the companion files of `source`;
    see `write_weights`."""
    write_weights(target, config, tensors, read, max_shard_bytes, advance)
    copy_companions(source, target)
    write_config(target, read_json(source / "config.json"), tensors)


def write_weights(
    target: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
    advance: Advance | None = None,
) -> None:
    """Write safetensors under Hugging Face's names into the folder `target`.

    tensors: meta tensors by our names, in the order to write. The dense layers of an embedding model go to their own
    folders. `config.architecture` decides on the prefix: a bare body (...Model) has none.
    """
    prefix = "" if config.architecture.endswith("Model") else "model."
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith("dense.")}
    theirs = {name if name.startswith("lm_head.") else prefix + name: name for name in body}
    _write_shards(
        target,
        {name: body[ours] for name, ours in theirs.items()},
        lambda name: read(theirs[name]),
        max_shard_bytes,
        advance,
    )
    for number, dense in enumerate(config.pooling.dense if config.pooling else ()):
        start = f"dense.{number}."
        own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        (target / dense.folder).mkdir(parents=True)
        write_safetensors(target / dense.folder / SINGLE, own, _prefixed(read, start), METADATA, advance)


def _prefixed(read: Callable[[str], Tensor], prefix: str) -> Callable[[str], Tensor]:
    return lambda name: read(prefix + name)


def _write_shards(
    target: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    max_bytes: int,
    advance: Advance | None,
) -> None:
    shards = split(tensors, max_bytes)
    if len(shards) == 1:
        write_safetensors(target / SINGLE, tensors, read, METADATA, advance)
        return
    files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(target / file, shard, read, METADATA, advance)
    total = sum(tensor.nbytes for tensor in tensors.values())
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Groups of at most `max_bytes` in the given order; a tensor larger than that is alone."""
    shards: list[dict[str, Tensor]] = [{}]
    room = max_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model but its weights: configurations, tokenizer, template, licence, pooling folders."""
    folders = [path.parent for path in source.glob("*/config.json")] if (source / "modules.json").is_file() else []
    for folder in (source, *folders):
        place = target / folder.relative_to(source)
        place.mkdir(exist_ok=True)
        for path in sorted({path for pattern in COMPANIONS for path in folder.glob(pattern)}):
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, place / path.name)


def write_config(target: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json with the dtype that the weights have now, and without the description of packed ones."""
    changed = {key: value for key, value in content.items() if key not in ("quantization_config", "torch_dtype")}
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.dim() > 1]
    most = max(dict.fromkeys(dtypes), key=dtypes.count, default=torch.float32)
    _write_json(target / "config.json", {**changed, "dtype": str(most).removeprefix("torch.")})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
