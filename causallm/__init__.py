"""causallm: run, convert, inspect and extend causal language models in plain PyTorch.

What it exports is imported when it is first asked for, so that the command line can answer without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causallm.causal_lm import CausalLM
    from causallm.factory import Factory
    from causallm.loading import load_model
    from causallm.transformer import Transformer
else:

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module 'causallm' has no attribute '{name}'")
        import_module("causallm.models")  # registers the families, whatever is asked for
        return getattr(import_module(_PLACES[name]), name)


__all__ = ["CausalLM", "Factory", "Transformer", "load_model"]
_PLACES = {
    "CausalLM": "causallm.causal_lm",
    "Factory": "causallm.factory",
    "Transformer": "causallm.transformer",
    "load_model": "causallm.loading",
}
