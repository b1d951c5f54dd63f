"""Reading a training run's YAML file, strictly: unknown keys, wrong types and values out of range are errors."""

import math
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from causallm.training.check_settings import check_settings
from causallm.training.nearest import nearest
from causallm.training.packing import PACKINGS
from causallm.training.settings import Settings
from causallm.training.strict_yaml import read_yaml

CHOICES = {
    "data.packing": tuple(PACKINGS),
    "schedule.kind": ("cosine", "linear", "constant"),
    "train.precision": ("fp32", "bf16"),
    "train.sharding": ("ddp", "fsdp"),
}
RANGES: dict[str, tuple[float, float | None]] = {
    "tokenizer.vocab_size": (257, None),
    "data.validation_fraction": (0.0, 0.5),
    "data.context_length": (2, None),
    "optimizer.learning_rate": (0.0, None),
    "optimizer.weight_decay": (0.0, None),
    "optimizer.beta1": (0.0, 0.9999),
    "optimizer.beta2": (0.0, 0.999999),
    "optimizer.epsilon": (0.0, None),
    "schedule.warmup_steps": (0, None),
    "schedule.final_fraction": (0.0, 1.0),
    "train.steps": (1, None),
    "train.epochs": (0.0, None),
    "train.batch_size": (1, None),
    "train.gradient_accumulation": (1, None),
    "train.clip_norm": (0.0, None),
    "train.dropout": (0.0, 0.9),
    "train.seed": (0, 2**31),
    "log.evaluate_every": (0, None),
    "log.evaluate_windows": (1, None),
    "log.checkpoint_every": (0, None),
    "log.keep_checkpoints": (1, None),
    "log.sample_every": (0, None),
    "log.sample_tokens": (1, None),
}
KINDS = {dict: "keys and values", str: "a text", int: "a whole number", bool: "true or false", float: "a number"}


def read_settings(path: Path) -> Settings:
    """The settings in `path`; FileNotFoundError, or a ValueError naming file, key, value and what was expected."""
    settings: Settings = _section(Settings, read_yaml(path), "", str(path))
    check_settings(settings, str(path))
    return settings


def _section(kind: Any, content: Any, prefix: str, source: str) -> Any:
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: {prefix.rstrip('.') or 'the file'} is {content!r}, expected keys and values")
    known = {entry.name: entry for entry in fields(kind)}
    for key in content:
        if key not in known:
            raise ValueError(f"{source}: unknown key '{prefix}{key}'{nearest(key, known)}")
    values = {}
    for name, entry in known.items():
        if name in content:
            values[name] = _value(entry.type, content[name], f"{prefix}{name}", source)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{source}: key '{prefix}{name}' is missing")
    return kind(**values)


def _value(kind: Any, value: Any, key: str, source: str) -> Any:
    if is_dataclass(kind):
        return _section(kind, value, f"{key}.", source)
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    plain = typing.get_origin(kind) or kind
    value = _texts(value, key, source) if plain is tuple else _plain(plain, value, key, source)
    if key in CHOICES and value not in CHOICES[key]:
        raise ValueError(f"{source}: {key} is {value!r}, expected one of {', '.join(CHOICES[key])}")
    low, high = RANGES.get(key, (None, None))
    if low is not None and not low <= value <= (math.inf if high is None else high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{source}: {key} is {value}, expected {limit}")
    return value


def _plain(kind: type, value: Any, key: str, source: str) -> Any:
    """A text, number, truth value or object. YAML 1.1 reads 1e-3 as text; a whole number may stand for any number."""
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):
            value = float(value)
    wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    if wrong or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{source}: {key} is {value!r}, expected {KINDS[kind]}")
    return value


def _texts(value: Any, key: str, source: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{source}: {key} is {value!r}, expected a list of texts")
    return tuple(items)
