"""Where a model comes from: what a folder's files say, whether there is a folder or one file that has it all."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from causallm.config.pooling import PoolingConfig
from causallm.tokenizer import Tokenizer
from causallm.transformer import Transformer
from causallm.weights.reader import WeightReader


class ModelSource(ABC):
    """A model on the disk. `path` is the folder or file; the JSON contents are those of Hugging Face's files."""

    path: Path

    @abstractmethod
    def config_json(self) -> dict[str, Any]:
        """What config.json says; FileNotFoundError or ValueError in one line where there is no such model."""

    @abstractmethod
    def generation_json(self) -> dict[str, Any]:
        """What generation_config.json says, {} where there is none."""

    @abstractmethod
    def runtime_json(self) -> dict[str, Any]:
        """What nntr_config.json says, {} where there is none."""

    @abstractmethod
    def pooling(self) -> PoolingConfig | None:
        """How an embedding model pools, where the source says so."""

    @abstractmethod
    def tokenizer(self, tokenizer_file: str | None) -> Tokenizer:
        """The tokenizer with its chat template; `tokenizer_file` names another tokenizer.json."""

    @abstractmethod
    def weights(self, model: Transformer) -> WeightReader:
        """The weights for `model`, which was built from this source."""

    @abstractmethod
    def write_companions(self, target: Path) -> None:
        """Write into a folder what belongs to a Hugging Face model but config.json and weights."""

    def written_dtype(self) -> torch.dtype | None:
        """The one dtype that all weights of a Hugging Face folder get; None keeps each one's own."""
        return None

    def label(self, file: str) -> str:
        """What messages call one of the JSON files."""
        return str(self.path / file)
