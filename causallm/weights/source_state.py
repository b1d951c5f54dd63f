"""What tells one state of a model folder or file from another without reading its weights."""

import hashlib
import json
from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".gguf")


def source_state(source: Path) -> str:
    """A fingerprint of the folder's place, its JSON files' content, and its weight files' names, sizes and times.

    Subfolders count too (an embedding model's dense layers), hidden ones do not: an output may be growing in one. Of a
    file that holds the whole model: place, size and time.
    """
    if source.is_file():
        return json.dumps([str(source.resolve()), source.stat().st_size, source.stat().st_mtime_ns])
    places = ((path, path.relative_to(source)) for pattern in ("*", "*/*") for path in source.glob(pattern))
    files = sorted(path for path, place in places if path.is_file() and not str(place).startswith("."))
    weights = [
        (str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
        if path.suffix in WEIGHTS
    ]
    content = [
        (str(path.relative_to(source)), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
        if path.suffix == ".json"
    ]
    return json.dumps([str(source.resolve()), weights, content])
