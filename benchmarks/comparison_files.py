"""The same weights for every system: packed folders for causallm and GGUF files for llama.cpp, made once and kept."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from causallm.causal_lm import CausalLM
from causallm.commands.convert import run_conversion
from causallm.loading import build_model, find_source
from causallm.weights.convert import Written
from causallm.weights.quantize import quantize
from causallm.weights.source_state import source_state

FLOATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PACKED = {"Q4_0": "Q6_K", "Q4_K": "Q6_K", "Q6_K": "Q6_K", "Q8_0": "Q8_0"}
"""Formats of linear layers, and that of embedding and head with each; those of llama.cpp's own files."""
DEFAULT_TYPES = "Q4_0,Q8_0,bf16,fp32"


@dataclass(frozen=True)
class Model:
    """The folder to compare on. max_length: of its context, in tokens. types: what its weights are run as; of a packed
    folder that which they are."""

    folder: Path
    vocab: int
    max_length: int
    types: tuple[str, ...]
    packed: bool
    identity: str


def read_model(folder: Path, types: str | None) -> Model:
    """Look at a folder without loading it; ValueError where it cannot be compared on, or not as `types` (commas)."""
    source = find_source(folder)
    model = build_model(source)
    if not folder.is_dir() or not isinstance(model, CausalLM):
        raise ValueError(f"{folder}: expected a folder with a model that generates text")
    formats = list(source.weights(model).formats().values())
    if formats:
        stored = max(dict.fromkeys(formats), key=formats.count)
        if types not in (None, stored):
            raise ValueError(f"{folder} is packed as {stored}: leave --types out, or give the folder it was made from")
        chosen: tuple[str, ...] = (stored,)
    else:
        chosen = tuple(dict.fromkeys((types or DEFAULT_TYPES).replace(" ", "").split(",")))
        for kind in chosen:
            if kind not in FLOATS | PACKED:
                known = ", ".join(FLOATS | PACKED)
                raise ValueError(f"--types: got '{kind}', expected some of {known}, with commas between them")
    identity = hashlib.sha256(source_state(folder).encode()).hexdigest()[:8]
    return Model(folder, model.config.vocab_size, model.max_length, chosen, bool(formats), identity)


def folder_of(model: Model, kind: str, work: Path) -> Path:
    """The folder that causallm loads for a type: the model's own, or a packed one in `work`."""
    if kind in FLOATS or model.packed:
        return model.folder
    output = work / _name(model, kind)
    if not output.exists():
        with tqdm(desc=f"packing {kind}", unit="B", unit_scale=True, disable=None, leave=False) as bar:

            def advance(step: Written) -> None:
                bar.total = step.total
                bar.update(step.nbytes)

            quantize(model.folder, output, kind, PACKED[kind], progress=advance, notice=_say)
    return output


def gguf_of(model: Model, kind: str, work: Path) -> Path:
    """llama.cpp's file of the weights in `folder_of`."""
    output = work / f"{_name(model, kind)}.gguf"
    if not output.exists():
        run_conversion(folder_of(model, kind, work), output, dtype=FLOATS.get(kind))
    return output


def _name(model: Model, kind: str) -> str:
    """Tells states of the source apart, so that what is there is never of another; it appears when it is whole."""
    return f"{model.folder.resolve().name}-{model.identity}-{kind}"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
