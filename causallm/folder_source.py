"""A model folder: Hugging Face's files, and nntr_config.json beside them."""

from pathlib import Path
from typing import Any

from causallm.config import read_json
from causallm.config.pooling import PoolingConfig, read_pooling
from causallm.model_source import ModelSource
from causallm.tokenizer import Tokenizer
from causallm.transformer import Transformer
from causallm.weights.huggingface import copy_companions
from causallm.weights.open import open_weights
from causallm.weights.reader import WeightReader

WEIGHTS = (".bin", ".safetensors")
NEEDED = "the model's config.json and tokenizer.json"


class FolderSource(ModelSource):
    """The files of a folder, each read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path

    def config_json(self) -> dict[str, Any]:
        """The error for a missing file says how to fetch the model where it can be."""
        if not self.path.is_dir():
            if self.path.is_file():
                raise ValueError(self._of_a_file())
            raise FileNotFoundError(f"there is no model folder {self.path}")
        if (self.path / "config.json").is_file():
            return read_json(self.path / "config.json")
        hint = ""
        if self.runtime_json().get("hf_repo"):
            hint = f"; fetch the model with: python main.py download {self.path}"
        elif files := sorted(self.path.glob("*.gguf")):
            hint = f"; to run a GGUF file name it: {files[0]}"
        elif files := sorted(path for path in self.path.iterdir() if path.suffix in WEIGHTS):
            hint = f", without which {files[0].name} cannot be read: put {NEEDED} beside it"
        raise FileNotFoundError(f"{self.path} has no config.json{hint}")

    def _of_a_file(self) -> str:
        """What is wrong with a path that is a file, and what to do about it."""
        folder, name = self.path.parent, self.path.name
        if self.path.suffix not in WEIGHTS:
            return f"{self.path} is a file, expected a model folder or a .gguf"
        if not (folder / "config.json").is_file():
            return f"{self.path} has no config.json beside it: put {NEEDED} there, and name the folder, {folder}"
        return f"{self.path} is a weight file, name its folder: {folder} --set model_file_name={name}"

    def generation_json(self) -> dict[str, Any]:
        return self._optional("generation_config.json")

    def runtime_json(self) -> dict[str, Any]:
        return self._optional("nntr_config.json")

    def _optional(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name) if (self.path / name).is_file() else {}

    def pooling(self) -> PoolingConfig | None:
        return read_pooling(self.path)

    def tokenizer(self, tokenizer_file: str | None) -> Tokenizer:
        return Tokenizer.from_folder(self.path, tokenizer_file)

    def weights(self, model: Transformer) -> WeightReader:
        return open_weights(self.path, model)

    def write_companions(self, target: Path) -> None:
        copy_companions(self.path, target)
