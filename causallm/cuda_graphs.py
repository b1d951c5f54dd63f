"""Decoding as one CUDA graph: the kernels of a step are recorded once and replayed for every further token.

For one token a GPU finishes a kernel sooner than Python can start the next; a graph starts all of them at once. It is
recorded over the memory that the caches have, and again when that has moved or more of it must be seen.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from causallm.blocks import run_blocks
from causallm.transformer import Transformer
from layers.fixed_step import FixedCache, FixedStep, frequencies_at
from layers.gpt_oss_moe import GptOssMoe
from layers.kv_cache import KVCache, Room
from layers.lm_head import softcap
from layers.mha_core import MHACore
from layers.qwen_moe import QwenMoe

FEWEST_SLOTS = 256
"""Slots of a cache that a graph sees at least; it sees a power of two of them, so that few graphs are recorded."""

Decode = Callable[[Tensor], Tensor]
"""Puts a token a row, (batch,), into the cache; returns the logits after it, (batch, vocab)."""
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Records what a function does on the device; returns what does it again, and the tensor that it writes each time."""


def graphed(
    model: Transformer, cache: Sequence[KVCache], padding: Int[Tensor, "batch"] | None, eager: Decode
) -> Decode:
    """A decoding step that is replayed where the model is on a CUDA device; `eager` elsewhere.

    Also `eager`, with a warning that says why, where a recording would not do what the step does: where the host
    decides (a mixture of experts, weights that are fetched, hooks) and where a cache has no slot to write to (8 bits).
    The logits returned are overwritten by the next step. Weights must stay where they are in between.
    """
    capture = capture_for(model.device)
    if capture is None:
        return eager
    reason = obstacle(model, cache)
    if reason is not None:
        _warn(reason)
        return eager
    return GraphDecoder(model, cache, padding, eager, capture)


def capture_for(device: torch.device) -> Capture | None:
    """What records on this device; None where nothing does."""
    if device.type != "cuda":
        return None

    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        # As torch's notes on CUDA graphs ask: first once on a side stream, so that kernels are compiled and libraries
        # have their memory. The outer context restores the stream where recording fails in the middle.
        with torch.cuda.device(device):
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    result = function()
            torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, result

    return capture


def obstacle(model: Transformer, cache: Sequence[KVCache]) -> str | None:
    """Why a recorded step would not do what the model does; None where it would."""
    from causallm.causal_lm import CausalLM  # which imports this through its generation

    modules = list(model.modules())
    windows = [module.window for module in modules if isinstance(module, MHACore)]
    if type(model).forward is not CausalLM.forward:
        return f"{type(model).__name__} has a forward of its own"
    if any(isinstance(module, QwenMoe | GptOssMoe) for module in modules):
        return "a mixture of experts is routed by the processor"
    if not model.storage.whole:
        return "the weights are fetched as they are needed"
    if any(_hooks(model)):
        return "a recorded step would not call the hooks"
    known = windows == [getattr(layer, "window", None) for layer in cache]
    if not known or not all(layer.takes(1) and layer.dtype.is_floating_point for layer in cache):
        return "the cache is of a kind that only the processor can write to"
    return None


def _hooks(model: Transformer) -> list[Any]:
    """Where hooks of the model would be, empty or not."""
    own = [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [_global_forward_hooks, _global_forward_pre_hooks, *own]


def _warn(reason: str) -> None:
    warnings.warn(f"decoding starts every kernel by itself, not as one CUDA graph: {reason}", stacklevel=2)


class GraphDecoder:
    """Decoding steps of one batch, recorded and replayed; `cache` holds what a step of the model would leave there."""

    def __init__(
        self,
        model: Transformer,
        cache: Sequence[KVCache],
        padding: Int[Tensor, "batch"] | None,
        eager: Decode,
        capture: Capture,
    ):
        self._model, self._cache, self._eager, self._capture = model, cache, eager, capture
        self._padding, self._padded = padding, None if padding is None else padding.tolist()
        self._hooks = _hooks(model)
        self._windows = [core.window for core in model.modules() if isinstance(core, MHACore)]
        ropes = {core.rope for core in model.modules() if isinstance(core, MHACore)}
        length = cache[0].offset + 1
        self._frequencies = {rope: frequencies_at(rope, length, self._padded).to(model.device) for rope in ropes}
        self._column = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._embedded: Tensor | None = None
        self._failed = False
        self._recorded: list[tuple[int, int, int]] = []
        self._graph: tuple[Callable[[], object], Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, tokens: Int[Tensor, "batch"]) -> Float[Tensor, "batch vocab"]:
        if self._failed or any(self._hooks) or not all(layer.takes(1) for layer in self._cache):
            return self._eager(tokens)
        offset = self._cache[0].offset
        rooms = [layer.claim(1) for layer in self._cache]
        self._place(tokens, offset)
        seen = [(_slots(room), room.keys.data_ptr(), room.values.data_ptr()) for room in rooms]
        if seen != self._recorded:
            try:
                self._record(rooms)
            except RuntimeError as error:
                for layer in self._cache:
                    layer.give_back(1)
                _warn(str(error).splitlines()[0])
                self._failed = True
                return self._eager(tokens)
            self._recorded = seen
        assert self._graph is not None
        replay, logits = self._graph
        replay()
        return logits

    def _place(self, tokens: Tensor, offset: int) -> None:
        """Lay out where the recorded step looks for it: the tokens' vectors, their column, frequencies that change.

        An embedding's scale comes from the host, which cannot be recorded.
        """
        model: Any = self._model
        vectors = model.embed_tokens(tokens[:, None])
        if self._embedded is None:
            self._embedded = vectors.clone()
        self._embedded.copy_(vectors)
        self._column.fill_(offset)
        for rope, held in self._frequencies.items():
            if rope.depends_on_length:
                held.copy_(frequencies_at(rope, offset + 1, self._padded))

    def _record(self, rooms: Sequence[Room]) -> None:
        # The graph before goes first, and its memory with it.
        self._graph = None
        views = [(room.keys[:, :, : _slots(room)], room.values[:, :, : _slots(room)]) for room in rooms]
        for room, view in zip(rooms, views, strict=True):
            for held in view:
                held[:, :, room.past :] = 0
        self._graph = self._capture(lambda: self._step(views))

    def _step(self, views: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "batch vocab"]:
        """`CausalLM.forward` for one embedded token a row, in fixed memory."""
        model: Any = self._model
        x = self._embedded
        assert x is not None
        step = FixedStep(self._column, self._padding, self._frequencies, x.dtype)
        slots = {window: step.slot(window) for window in dict.fromkeys(self._windows)}
        cache = [FixedCache(*view, slots[window]) for view, window in zip(views, self._windows, strict=True)]
        hidden = model.norm(run_blocks(model.layers, x, step, cache, model.storage))
        project = model.embed_tokens.project if model.config.tie_word_embeddings else model.lm_head
        return softcap(project(hidden), model.config.final_logit_softcapping)[:, -1]


def _slots(room: Room) -> int:
    """How many slots a graph sees, at least those in use."""
    return min(max(FEWEST_SLOTS, 1 << (room.past - 1).bit_length()), room.keys.shape[2])
