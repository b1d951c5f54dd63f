"""gpt-oss's fused experts with weights packed in ggml's block formats."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers.gpt_oss_moe import GptOssExperts
from layers.kernels.block_formats import BLOCK_FORMATS
from layers.kernels.packed_product import packed_product


class PackedGptOssExperts(GptOssExperts):
    """Experts of which the tensors that `kinds` names are packed: (experts, out, row_bytes), an output a row.

    kinds: "gate_up_proj" or "down_proj" to a name in `BLOCK_FORMATS`; a tensor that it does not name has `dtype`.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        alpha: float,
        limit: float,
        kinds: Mapping[str, str],
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_experts, dim, hidden, alpha, limit, dtype)
        self.kinds = dict(kinds)
        for name, kind in self.kinds.items():
            _, in_features, out_features = getattr(self, name).shape
            shape = (num_experts, out_features, BLOCK_FORMATS[kind].row_bytes(in_features))
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False))

    @classmethod
    def in_place_of(cls, experts: GptOssExperts, kinds: Mapping[str, str]) -> "PackedGptOssExperts":
        """An empty one of the same sizes and dtype."""
        number, hidden, dim = experts.down_proj.shape
        activation = experts.activation
        return cls(number, dim, hidden, activation.alpha, activation.limit, kinds, experts.down_proj.dtype)

    def project(
        self, name: str, expert_id: int, x: Float[Tensor, "tokens in_features"]
    ) -> Float[Tensor, "tokens out_features"]:
        if name not in self.kinds:
            return super().project(name, expert_id, x)
        product = packed_product(x, getattr(self, name)[expert_id], self.kinds[name])
        return product + getattr(self, f"{name}_bias")[expert_id].to(product.dtype)
