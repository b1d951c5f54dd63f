"""The head that turns a body into a text-embedding model: pooling, dense layers, normalisation."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from causallm.config.pooling import PoolingConfig
from causallm.prompt_ids import left_pad
from causallm.report import Report
from causallm.storage.step_memory import rows_that_fit
from causallm.transformer import Transformer
from layers.kv_cache import KVCache


class EmbeddingModel(Transformer):
    """A Transformer that gives one vector a text; what pools them is config.json's neighbour modules.json."""

    default_pooling: ClassVar[str] = "last"
    in_steps = False

    def constructModel(self) -> None:
        super().constructModel()
        self.pooling = self.config.pooling or PoolingConfig(self.default_pooling)
        self.dense = nn.Sequential(
            *(
                nn.Sequential(OrderedDict(linear=self.make_linear(dense.in_features, dense.out_features, dense.bias)))
                for dense in self.pooling.dense
            )
        )

    def forward(
        self,
        ids: Int[Tensor, "batch time"],
        cache: Sequence[KVCache] | None = None,
        *,
        padding: Int[Tensor, "batch"] | None = None,
        rope_length: int | None = None,
        documents: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch embedding"]:
        """One vector per row of left-padded `ids`."""
        hidden = super().forward(ids, cache, padding=padding, rope_length=rope_length, documents=documents)
        pooled = self.dense(pool(hidden, padding, self.pooling.pooling))
        return functional.normalize(pooled, dim=-1) if self.pooling.normalize else pooled

    def encode(self, texts: Sequence[str], report: Report | None = None) -> Float[Tensor, "texts embedding"]:
        """The vectors of several texts, nntr_config.json's head and tail around each, as each would be alone.

        At most batch_size run together, fewer where a memory budget has no room for them; `report` counts their tokens.
        ValueError for a text that does not fit.
        """
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer, so it cannot take text")
        if not texts:
            raise ValueError("there is no text to encode")
        head, tail = self.runtime_config.head_prompt, self.runtime_config.tail_prompt
        rows = [self.tokenizer.encode_prompt(head + text + tail) for text in texts]
        for row in rows:
            if not 0 < len(row) <= self.max_length:
                raise ValueError(f"the text has {len(row)} tokens, expected 1 to {self.max_length}")
        if report:
            report.prompt_tokens += sum(map(len, rows))
        size = rows_that_fit(self, self.runtime_config.batch_size or len(rows), max(map(len, rows)))
        with torch.inference_mode():
            vectors = []
            for start in range(0, len(rows), size):
                ids, padding = left_pad(rows[start : start + size], self.device)
                vectors.append(self(ids, padding=padding))
            return torch.cat(vectors)


def pool(
    hidden: Float[Tensor, "batch time dim"], padding: Int[Tensor, "batch"] | None, pooling: str
) -> Float[Tensor, "batch dim"]:
    """One vector a row: of the last or first token, or the mean or maximum over its tokens."""
    batch, time, _ = hidden.shape
    if padding is None:
        padding = torch.zeros(batch, dtype=torch.long, device=hidden.device)
    if pooling == "last":
        return hidden[:, -1]
    if pooling == "cls":
        return hidden[torch.arange(batch, device=hidden.device), padding]
    padded = (torch.arange(time, device=hidden.device) < padding[:, None])[:, :, None]
    if pooling == "max":
        return hidden.masked_fill(padded, -torch.inf).amax(1)
    return hidden.masked_fill(padded, 0.0).sum(1) / (time - padding)[:, None].to(hidden.dtype)
