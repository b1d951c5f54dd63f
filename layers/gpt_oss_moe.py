"""gpt-oss's mixture of experts: the best few by score, softmax over those; fused, biased, interleaved experts."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers.expert_store import Expert, ExpertStore
from layers.moe_routing import mix_experts
from layers.precision import at_least_float32
from layers.swiglu import ClampedSwiGLU


class GptOssExperts(nn.Module):
    """All experts in four tensors, (experts, in, out) as the checkpoint has them; an expert store of its own.

    One that holds a single expert is that expert, too.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        alpha: float,
        limit: float,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden, dtype=dtype))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(num_experts, 2 * hidden, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, dim, dtype=dtype))
        self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, dim, dtype=dtype))
        self.activation = ClampedSwiGLU(alpha, limit)

    def __len__(self) -> int:
        return self.gate_up_proj.shape[0]

    def fetch(self, expert_ids: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Yield each asked-for expert with its number."""
        for expert_id in expert_ids:
            yield expert_id, partial(self._expert, expert_id)

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        assert len(self) == 1, "one of several experts is had from fetch"
        return self._expert(0, x)

    def _expert(self, expert_id: int, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """Gate and up stand in alternating columns."""
        gate_up = self.project("gate_up_proj", expert_id, x)
        hidden = self.activation(gate_up[:, ::2], gate_up[:, 1::2])
        return self.project("down_proj", expert_id, hidden)

    def project(
        self, name: str, expert_id: int, x: Float[Tensor, "tokens in_features"]
    ) -> Float[Tensor, "tokens out_features"]:
        """One expert's product with the tensor `name` and its bias."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        return torch.addmm(bias[expert_id], x.to(weight.dtype), weight[expert_id])


class GptOssMoe(nn.Module):
    """Router (with bias) and experts; the softmax is over the scores of the chosen."""

    def __init__(self, router: nn.Module, experts: ExpertStore, num_chosen: int):
        super().__init__()
        self.router, self.experts, self.num_chosen = router, experts, num_chosen

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        tokens = x.flatten(0, 1)
        scores, chosen = self.router(tokens).topk(self.num_chosen, -1)
        weights = scores.softmax(-1, dtype=at_least_float32(x.dtype)).to(x.dtype)
        return mix_experts(tokens, chosen, weights, self.experts).view_as(x)
