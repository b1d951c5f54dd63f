"""The head that turns a body into a language model: logits and generated text."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causallm.blocks import head_half, run_to_logits
from causallm.generation import Event, generate
from causallm.options import generation_options
from causallm.prompt_cache.file import is_prompt_cache, load_prompt_cache, save_prompt_cache
from causallm.prompt_cache.make import head_prompt_cache
from causallm.prompt_cache.nntr_file import read_nntr_cache, write_nntr_cache
from causallm.prompt_cache.reuse import PromptCache
from causallm.report import Report
from causallm.steps import Progress
from causallm.storage.storage import HEAD
from causallm.transformer import Transformer
from layers.kv_cache import KVCache
from layers.lm_head import LmHead, softcap


class CausalLM(Transformer):
    """A Transformer with a vocabulary head, tied to the embedding or of its own."""

    def registerCustomLayers(self) -> None:
        super().registerCustomLayers()
        self.registry.register("lm_head", LmHead)

    def constructModel(self) -> None:
        super().constructModel()
        if not self.config.tie_word_embeddings:
            self.lm_head = self.createLayer(
                "lm_head",
                in_features=self.config.hidden_size,
                out_features=self.config.vocab_size,
                dtype=self.runtime_config.lmhead_dtype or self.dtype,
            )

    def forward(
        self,
        ids: Int[Tensor, "batch time"],
        cache: Sequence[KVCache] | None = None,
        *,
        padding: Int[Tensor, "batch"] | None = None,
        rope_length: int | None = None,
        documents: Int[Tensor, "batch time"] | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "batch positions vocab"]:
        """Logits of all positions, or of the `last` so many; the other arguments are `Transformer.forward`'s."""
        self.storage.begin(head=last != 0)
        x, step = self._begin(ids, cache, padding, rope_length, documents)
        projecting = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        head = head_half(self.norm, projecting, x.dtype) if self.storage.whole and self.storage.keeps_head else None
        if head is not None and (last is None or last >= ids.shape[1]):
            logits = run_to_logits(self.layers, x, step, cache, head)
            if logits is not None:
                return softcap(logits, self.config.final_logit_softcapping)
        hidden = self._hidden(x, step, cache, head)
        if last is not None:
            # A copy with strides of its own: for a strided row the product would first copy the whole head.
            hidden = hidden[:, max(ids.shape[1] - last, 0) :].clone(memory_format=torch.contiguous_format)
        if last == 0:
            return hidden.new_empty(hidden.shape[0], 0, self.config.vocab_size)
        self.storage.check_gradient(hidden)
        with self.storage.resident(HEAD):
            logits = projecting.project(hidden) if self.config.tie_word_embeddings else projecting(hidden)
        return softcap(logits, self.config.final_logit_softcapping)

    def stream(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        system: str | None = None,
        chat: bool | None = None,
        template_variables: Mapping[str, Any] | None = None,
        static_cache: bool = False,
        truncate: bool = False,
        report: Report | None = None,
        on_prefill: Progress | None = None,
        prompt_cache: PromptCache | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """Answer a prompt, or several as one batch, event by event; each is text or a sequence of token ids.

        chat: wrap text with the model's chat template; None does so when there is one and the text carries none of
        its special tokens. system is the template's system message. options are fields of GenerationConfig, or
        bad_words. prompt_cache: what the prompts may begin with; None takes that of nntr_config.json's system_prompt,
        where it keeps one. See `causallm.generation.generate` for the rest. A mistake in any of them is a ValueError at
        once.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [
            self.encode_prompt(prompt, system, chat, template_variables) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        config = generation_options(self.generation_config, self.tokenizer, self.config.vocab_size, **options)
        report = Report() if report is None else report
        text = next((prompt for prompt in prompts if isinstance(prompt, str)), None)
        if prompt_cache is None and text is not None and self.runtime_config.head_cache_path:

            def encode(other: str) -> list[int]:
                return self.encode_prompt(other, system, chat, template_variables)

            prompt_cache = head_prompt_cache(self, encode, text, report)
        return generate(
            self,
            rows,
            config,
            static_cache=static_cache,
            truncate=truncate,
            report=report,
            on_prefill=on_prefill,
            prompt_cache=prompt_cache,
        )

    def generate_text(self, prompts: str | Sequence[str | Sequence[int]], **options: Any) -> Any:
        """The answer to a prompt, or the list of answers to several; options are those of `stream`."""
        texts = [""] * (1 if isinstance(prompts, str) else len(prompts))
        for event in self.stream(prompts, **options):
            texts[event.row] += event.text
        return texts[0] if isinstance(prompts, str) else texts

    def run(self, prompt: str, system_prompt: str = "", tail_prompt: str = "", **options: Any) -> str:
        """Answer `system_prompt + prompt + tail_prompt`, NNTrainer's way; each event goes to `registerOutputs`."""
        text = ""
        for event in self.stream(system_prompt + prompt + tail_prompt, **options):
            self.registerOutputs(event)
            text += event.text
        return text

    def save_kvcache(
        self,
        path: str | Path,
        to: int | None = None,
        *,
        cache: Sequence[KVCache],
        ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        nntrainer: bool = False,
    ) -> None:
        """Write the first `to` positions of a cache, or all, and the ids of their tokens (a list for each row).

        nntrainer: as NNTrainer's raw file, which holds no ids and knows no model. ValueError for what cannot be held.
        """
        if nntrainer:
            write_nntr_cache(Path(path), self, cache, to)
        elif ids is None:
            raise ValueError("a prompt cache is saved with the ids of its tokens, expected ids")
        else:
            save_prompt_cache(Path(path), self, cache, ids, to)

    def load_kvcache(self, path: str | Path, to: int | None = None, *, ids: Sequence[int] | None = None) -> PromptCache:
        """Read the first `to` positions, or all, of a file of `save_kvcache`; ValueError where it does not fit.

        ids: of the tokens that NNTrainer's raw file stands for, which does not say them.
        """
        path = Path(path)
        if is_prompt_cache(path):
            return load_prompt_cache(path, self, to)
        if ids is None:
            raise ValueError(
                f"{path} is no prompt cache of this program; one of NNTrainer's is read with the ids of its tokens"
            )
        return read_nntr_cache(path, self, ids, to)

    def registerOutputs(self, event: Event) -> None:
        """Called by `run` with each token as it comes; override to show or record it."""

    def encode_prompt(
        self,
        text: str,
        system: str | None = None,
        chat: bool | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a prompt, nntr_config.json's head and tail around it, in the chat template where asked."""
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer, so it takes token ids only")
        if not text:
            raise ValueError("the prompt is empty, expected some text")
        text = self.runtime_config.head_prompt + text + self.runtime_config.tail_prompt
        if chat is None:
            chat = self.tokenizer.chat_template is not None and not self.tokenizer.carries_special_tokens(text)
        if not chat:
            if system or template_variables:
                raise ValueError(
                    "a system message or template variable needs the chat template, which this prompt does not use"
                )
            return self.tokenizer.encode_prompt(text)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        rendered = self.tokenizer.render(messages, **(template_variables or {}))
        return self.tokenizer.encode(rendered, add_special_tokens=False)
