"""A model in one GGUF file, seen as the folder that it could have been."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from causallm.config.fields import DTYPES
from causallm.config.pooling import PoolingConfig, pooling_files
from causallm.gguf.families import Family
from causallm.gguf.format import MAGIC, GgufFile, read_gguf
from causallm.gguf.read_config import config_json, float_dtype, generation_json, pooling, read_family, runtime_json
from causallm.gguf.read_tokenizer import (
    backend_json,
    chat_template,
    has_tokenizer,
    read_backend,
    tokenizer_config,
)
from causallm.gguf.reader import GgufReader
from causallm.model_source import ModelSource
from causallm.tokenizer import Tokenizer
from causallm.transformer import Transformer
from causallm.weights.reader import WeightReader

SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether `path` is meant to be a GGUF file: by its name, or by what it begins with."""
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class GgufSource(ModelSource):
    """The header is read once, when something is asked for; errors name the file and what is wrong with it."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def file(self) -> GgufFile:
        """The checked header."""
        return read_gguf(self.path)

    @cached_property
    def family(self) -> Family:
        """Which of the families it is."""
        return read_family(self.file)

    def config_json(self) -> dict[str, Any]:
        return config_json(self.file, self.family)

    def generation_json(self) -> dict[str, Any]:
        return generation_json(self.file)

    def runtime_json(self) -> dict[str, Any]:
        return runtime_json(self.file, self.family)

    def pooling(self) -> PoolingConfig | None:
        mode = pooling(self.file, self.family)
        return PoolingConfig(mode) if mode else None

    def tokenizer(self, tokenizer_file: str | None) -> Tokenizer:
        if tokenizer_file is not None:
            return Tokenizer.from_folder(self.path.parent, tokenizer_file)
        if not has_tokenizer(self.file):
            raise FileNotFoundError(
                f"{self.path} has no tokenizer; name a tokenizer.json with --set tokenizer_file=..."
            )
        config, template = tokenizer_config(self.file), chat_template(self.file)
        path = self.path  # the header, which holds the whole vocabulary as texts, is not to live as long as the model
        return Tokenizer(path, read_backend(self.file), config, template, lambda: backend_json(read_gguf(path)))

    def weights(self, model: Transformer) -> WeightReader:
        return GgufReader(self.file, self.family, model)

    def write_companions(self, target: Path) -> None:
        contents: dict[str, Any] = {"generation_config.json": self.generation_json()}
        if has_tokenizer(self.file):
            contents["tokenizer.json"] = backend_json(self.file)
            contents["tokenizer_config.json"] = tokenizer_config(self.file)
        if own := self.pooling():
            contents |= {"nntr_config.json": {"model_type": "embedding"}, **pooling_files(own)}
        for name, content in contents.items():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if (template := chat_template(self.file)) is not None:
            (target / "chat_template.jinja").write_text(template.source, encoding="utf-8")

    def written_dtype(self) -> torch.dtype:
        return DTYPES[float_dtype(self.file) or "bfloat16"]

    def label(self, file: str) -> str:
        return str(self.path)
