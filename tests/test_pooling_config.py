"""The files of sentence-transformers that say how an embedding model pools."""

import json
from pathlib import Path
from typing import Any

import pytest

from causallm.config.pooling import POOLINGS, DenseConfig, PoolingConfig, pooling_files, read_pooling


def write_modules(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))


PREFIX = "sentence_transformers.models."
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": PREFIX + "Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": PREFIX + "Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": PREFIX + "Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": PREFIX + "Normalize"},
]
DENSE = {"in_features": 8, "out_features": 4, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "last"])
def test_pooling_files_of_sentence_transformers(tmp_path: Path, mode: str) -> None:
    assert read_pooling(tmp_path) is None
    flags = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}
    old = {"word_embedding_dimension": 8} | {f"pooling_mode_{flag}": kind == mode for kind, flag in flags.items()}
    new = {"pooling_mode": "lasttoken" if mode == "last" else mode}
    for pooling in (old, new):
        write_modules(
            tmp_path, {"modules.json": MODULES, "1_Pooling/config.json": pooling, "2_Dense/config.json": DENSE}
        )
        assert read_pooling(tmp_path) == PoolingConfig(mode, True, (DenseConfig("2_Dense", 8, 4, False),))
    write_modules(tmp_path, {"modules.json": MODULES[:2]})
    assert read_pooling(tmp_path) == PoolingConfig(mode, False, ())


@pytest.mark.parametrize("mode", sorted(POOLINGS.values()))
@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, mode: str, normalize: bool) -> None:
    write_modules(tmp_path, pooling_files(PoolingConfig(mode, normalize)))
    assert read_pooling(tmp_path) == PoolingConfig(mode, normalize)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": [{"type": PREFIX + "LSTM"}]}, "modules.json: unknown module '.*LSTM', expected Transformer"),
        ({"modules.json": [{"path": ""}]}, "modules.json: expected a list of objects with a type"),
        ({"modules.json": {"a": 1}}, "modules.json:1: expected a JSON list"),
        ({"1_Pooling/config.json": {"pooling_mode_mean_sqrt_len_tokens": True}}, "1_Pooling.*expected one of"),
        (
            {"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}},
            "1_Pooling.*expected one of",
        ),
        ({"2_Dense/config.json": {**DENSE, "activation_function": "torch.nn.Tanh"}}, "torch.nn.Tanh is not supported"),
        ({"2_Dense/config.json": {**DENSE, "in_features": "8"}}, "in_features is '8', expected a whole number"),
    ],
)
def test_mistakes_in_pooling_files_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    good = {"1_Pooling/config.json": {"pooling_mode": "mean"}, "2_Dense/config.json": DENSE}
    write_modules(tmp_path, {"modules.json": MODULES, **good, **files})
    with pytest.raises(ValueError, match=message):
        read_pooling(tmp_path)
