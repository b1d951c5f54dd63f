"""Prompts whose keys and values are kept: in memory, in files of this project's format, and in NNTrainer's."""

from causallm.prompt_cache.file import load_prompt_cache, save_prompt_cache
from causallm.prompt_cache.reuse import PromptCache

__all__ = ["PromptCache", "load_prompt_cache", "save_prompt_cache"]
