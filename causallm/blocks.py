"""The wiring of layers inside a decoder block; residual connections live here and nowhere else."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causallm.storage.storage import Storage
from layers.gpt_oss_moe import GptOssMoe
from layers.kernels.half_arguments import ATTENTION, HEAD, HEADS, MLP, MOE, Half
from layers.kernels.halves import run_halves
from layers.kernels.part_arguments import BLOCK_NORMS
from layers.kv_cache import KVCache
from layers.qwen_moe import QwenMoe
from layers.step import Step


class Attention(nn.Module):
    """Projections around an attention core. `q_norm`, `k_norm` and `sinks` are set by families that have them."""

    def __init__(self, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module, o_proj: nn.Module, core: nn.Module):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.register_parameter("sinks", None)
        self.core = core

    def forward(
        self, x: Float[Tensor, "batch time dim"], step: Step, cache: KVCache | None
    ) -> Float[Tensor, "batch time dim"]:
        query, key = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        return self.o_proj(self.core(query, key, self.v_proj(x), step, cache, self.sinks))


class Mlp(nn.Module):
    """down(activation(gate(x), up(x)))."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation = activation

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))


class DecoderBlock(nn.Module):
    """Norm before attention and before the MLP, each with its residual (Llama's order)."""

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
    ):
        super().__init__()
        self.input_layernorm, self.self_attn = input_layernorm, self_attn
        self.post_attention_layernorm, self.mlp = post_attention_layernorm, mlp

    def halves(self) -> tuple[Half, Half]:
        """What the block does: attention, then MLP."""
        return (
            Half(KINDS.get(type(self.self_attn)), self, self.self_attn, self.input_layernorm),
            Half(KINDS.get(type(self.mlp)), self, self.mlp, self.post_attention_layernorm, expert_type=Mlp),
        )

    def forward(
        self, x: Float[Tensor, "batch time dim"], step: Step, cache: KVCache | None
    ) -> Float[Tensor, "batch time dim"]:
        attention, mlp = self.halves()
        x = _run_half(attention, x, step, cache)
        return _run_half(mlp, x, step, cache)


class SandwichBlock(DecoderBlock):
    """Norms before and after attention and MLP, the residual around both (Gemma 2 and 3's order)."""

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
        pre_feedforward_layernorm: nn.Module,
        post_feedforward_layernorm: nn.Module,
    ):
        super().__init__(self_attn, mlp, input_layernorm, post_attention_layernorm)
        self.pre_feedforward_layernorm = pre_feedforward_layernorm
        self.post_feedforward_layernorm = post_feedforward_layernorm

    def halves(self) -> tuple[Half, Half]:
        attention, mlp = super().halves()
        return (
            attention._replace(post_norm=self.post_attention_layernorm),
            mlp._replace(norm=self.pre_feedforward_layernorm, post_norm=self.post_feedforward_layernorm),
        )


KINDS: dict[type[nn.Module], int] = {Attention: ATTENTION, Mlp: MLP, QwenMoe: MOE, GptOssMoe: MOE}
"""Bodies of halves that the native kernels know; a subclass may do something else."""


def run_blocks(
    blocks: nn.ModuleList,
    x: Float[Tensor, "batch time dim"],
    step: Step,
    cache: Sequence[KVCache] | None,
    storage: Storage,
    head: Half | None = None,
) -> Float[Tensor, "batch time dim"]:
    """What the blocks make of x one after the other; in one native call where the kernels know all of them and the
    weights of all are in memory. head: the same as `run_to_logits` gets, for both share what they find out."""
    if storage.whole:
        result = run_halves(blocks, lambda: _halves_of(blocks, head), x, step, cache, head)
        if result is not None:
            return result
    for layer_id, block in enumerate(blocks):
        storage.check_gradient(x)
        with storage.resident(layer_id):
            x = block(x, step, cache[layer_id] if cache else None)
    storage.check_gradient(x)
    return x


def run_to_logits(
    blocks: nn.ModuleList, x: Float[Tensor, "batch time dim"], step: Step, cache: Sequence[KVCache] | None, head: Half
) -> Float[Tensor, "batch time vocab"] | None:
    """Logits of a few tokens, by the blocks and the head, in one native call; None where it cannot be one."""
    return run_halves(blocks, lambda: _halves_of(blocks, head), x, step, cache, head, to_logits=True)


def head_half(norm: nn.Module, head: nn.Module, dtype: torch.dtype) -> Half | None:
    """What `run_to_logits` wants; None where one may do something else, or has other floats than the blocks."""
    if type(norm) not in BLOCK_NORMS or type(head) not in HEADS:
        return None
    known = norm.weight.dtype == dtype and head.weight.dtype in (torch.uint8, dtype)
    return Half(HEAD, head, head, norm) if known else None


def _halves_of(blocks: nn.ModuleList, head: Half | None) -> list[Half]:
    """All halves in order, and the head; none where a block is of a class that may do something else."""
    known = [
        block for block in blocks if isinstance(block, DecoderBlock) and type(block) in (DecoderBlock, SandwichBlock)
    ]
    if len(known) != len(blocks):
        return []
    return [half for block in known for half in block.halves()] + ([] if head is None else [head])


def _run_half(
    half: Half, x: Float[Tensor, "batch time dim"], step: Step, cache: KVCache | None
) -> Float[Tensor, "batch time dim"]:
    """One half, in one native call where the kernels know it."""
    attends = half.body is half.block._modules["self_attn"]
    if half.kind is not None:
        caches = None if cache is None else ([cache] if attends else [])
        result = run_halves(half.body, lambda: [half], x, step, caches)
        if result is not None:
            return result
    normalised = half.norm(x)
    change = half.body(normalised, step, cache) if attends else half.body(normalised)
    return x + (change if half.post_norm is None else half.post_norm(change))
