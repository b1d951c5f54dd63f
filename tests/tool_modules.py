"""The modules in tools/, which import each other as scripts beside them do."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def tool_module(name: str) -> Iterator[Any]:
    """What a fixture yields: the module, with tools/ on the path while it is in use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module(name)
