"""Layers whose weight is packed in one of ggml's block formats: fully connected, embedding, and both at once."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layers.kernels.block_formats import BLOCK_FORMATS
from layers.kernels.packed_product import expanded, packed_product


class PackedLinear(nn.Module):
    """y = x W^T + b with a weight packed as `kind` ("Q4_0"), whose bytes are `weight` (out_features, row_bytes)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, kind: str = "Q8_0"):
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        shape = (out_features, BLOCK_FORMATS[kind].row_bytes(in_features))
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight as floats."""
        return torch.Size((self.out_features, self.in_features))

    def forward(self, x: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:
        product = packed_product(x, self.weight, self.kind)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        """The weight as fp32."""
        return expanded(self.weight, self.kind)

    @classmethod
    def from_float(
        cls,
        weight: Float[Tensor, "out_features in_features"],
        bias: Float[Tensor, "out_features"] | None = None,
        kind: str = "Q8_0",
    ) -> "PackedLinear":
        """A layer that holds `weight` packed."""
        out_features, in_features = weight.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, bias is not None, kind)
        layer.weight = nn.Parameter(BLOCK_FORMATS[kind].pack(weight), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
        return layer


class PackedEmbedding(nn.Module):
    """An embedding with a packed table, of which only the rows asked for are expanded; also the head of a tied model.

    `scale` is rounded to `activation_dtype`, the dtype of the vectors.
    """

    def __init__(self, num_embeddings: int, dim: int, scale: float, kind: str, activation_dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.dim, self.kind = num_embeddings, dim, kind
        self.scale, self.activation_dtype = scale, activation_dtype
        shape = (num_embeddings, BLOCK_FORMATS[kind].row_bytes(dim))
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)

    @property
    def shape(self) -> torch.Size:
        """The shape of the table as floats."""
        return torch.Size((self.num_embeddings, self.dim))

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
        rows = expanded(self.weight[ids.flatten()], self.kind, self.activation_dtype)
        vectors = rows.view(*ids.shape, -1)
        return vectors * torch.tensor(self.scale, dtype=vectors.dtype) if self.scale != 1.0 else vectors

    def project(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        """Logits: hidden times the transposed table."""
        return packed_product(hidden, self.weight, self.kind)

    def dequantize(self) -> Float[Tensor, "vocab dim"]:
        """The table as fp32."""
        return expanded(self.weight, self.kind)
