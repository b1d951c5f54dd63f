"""Where each of our tensors is in a GGUF file: the tensors there, the expert in them, and how values change."""

import re
from dataclasses import dataclass

from causallm.config.model import ModelConfig
from causallm.gguf.changes import Change, FromOne, GateAndUp, RotaryPairs, Transposed
from causallm.gguf.families import EXPERTS, OUTER, Family

ROPE_FACTORS = "rope_freqs.weight"
"""What frequencies are divided by; a tensor of no weight of ours."""

AS_IT_IS = Change()
FUSED = {
    "gate_up_proj": (("ffn_gate_exps.weight", "ffn_up_exps.weight"), GateAndUp()),
    "gate_up_proj_bias": (("ffn_gate_exps.bias", "ffn_up_exps.bias"), GateAndUp()),
    "down_proj": (("ffn_down_exps.weight",), Transposed()),
    "down_proj_bias": (("ffn_down_exps.bias",), AS_IT_IS),
}


@dataclass(frozen=True)
class Place:
    """One of our tensors in a GGUF file: names there, which expert's slice of them (None: all), and the change."""

    names: tuple[str, ...]
    expert: int | None = None
    change: Change = AS_IT_IS


def place(name: str, family: Family, config: ModelConfig) -> Place:
    """The place of our tensor `name`; a name that the family has not keeps its name, for a reader to complain."""
    block = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if block is None:
        module, _, kind = name.rpartition(".")
        outer = {ours: gguf for gguf, ours in OUTER.items()}.get(module)
        return Place((f"{outer}.{kind}" if outer else name,), change=_change(name, family, config))
    start, inner = f"blk.{block[1]}.", block[2]
    if expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)\.weight", inner):
        return Place((f"{start}{EXPERTS.get(expert[2], expert[2])}.weight",), int(expert[1]))
    if family.fused_experts and (fused := FUSED.get(inner.removeprefix("mlp.experts."))):
        return Place(tuple(start + part for part in fused[0]), change=fused[1])
    theirs = {ours: gguf for gguf, ours in family.block.items()}
    module, _, kind = inner.rpartition(".")
    gguf = theirs.get(inner) or (f"{theirs[module]}.{kind}" if module in theirs else inner)
    return Place((start + gguf,), change=_change(name, family, config))


def _change(name: str, family: Family, config: ModelConfig) -> Change:
    if family.counts_norms_from_one and name.endswith("norm.weight"):
        return FromOne()
    if family.rotates_pairs and ".self_attn.q_proj." in name:
        return RotaryPairs(config.num_attention_heads)
    if family.rotates_pairs and ".self_attn.k_proj." in name:
        return RotaryPairs(config.num_key_value_heads)
    return AS_IT_IS
