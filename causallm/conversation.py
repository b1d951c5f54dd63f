"""A conversation with a model: the messages and the cache, so that each turn computes only what is new."""

import copy
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from causallm.causal_lm import CausalLM
from causallm.config import GenerationConfig
from causallm.context_window import check_way, fit
from causallm.generation import Event, generate
from causallm.kept_cache import KeptCache
from causallm.options import generation_options
from causallm.prompt_cache import PromptCache, load_prompt_cache, save_prompt_cache
from causallm.report import Report
from causallm.steps import Progress
from causallm.storage.step_memory import planned_capacity
from causallm.tokenizer import Tokenizer
from causallm.transcript import Message, load_messages, save_messages


@dataclass(frozen=True)
class Turn:
    """What the model was given for an answer.

    prompt: the rendered conversation. tokens: of what the model sees of it, the first `reused` of which were in the
    cache already. dropped: messages that left the conversation, slid: tokens left out, both because it was full.
    """

    prompt: str
    tokens: int
    reused: int
    dropped: int = 0
    slid: int = 0


class Conversation:
    """Messages, and the keys and values of those that the model has seen.

    Each turn renders the whole of `messages` with the chat template and computes what differs from the turn before:
    normally the new message alone, more where the template drops earlier thinking or `messages`, which are the
    caller's to change, have changed. Answers are those to the whole conversation computed afresh, but for rounding.

    on_full: what happens to a conversation longer than the context, see `causallm.context_window.WAYS`.
    template_variables: what else the template reads, such as enable_thinking. static_cache: allocate the cache of the
    whole context at once, as is done under a memory budget in any case. prompt_cache: what the first turn may begin
    with; a copy is taken, but under a memory budget it is used up. options: fields of GenerationConfig, or bad_words. A
    mistake is a ValueError at once.
    """

    def __init__(
        self,
        model: CausalLM,
        system: str | None = None,
        *,
        on_full: str = "refuse",
        template_variables: Mapping[str, Any] | None = None,
        static_cache: bool = False,
        prompt_cache: PromptCache | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self.messages: list[Message] = []
        self.template_variables = dict(template_variables or {})
        self.turn: Turn | None = None
        self.report = Report()
        self._cache = KeptCache(model)
        self._capacity = model.max_length if static_cache else planned_capacity(model)
        self._options: dict[str, Any] = {}
        self._answering = False
        self.system, self.on_full = system, on_full
        self.configure(**options)
        self._render([*self.messages, {"role": "user", "content": "x"}])
        if prompt_cache is not None:
            self._cache.adopt(prompt_cache, self._capacity)

    @property
    def system(self) -> str | None:
        """The system message, None where there is none."""
        return self.messages[0]["content"] if self._has_system else None

    @system.setter
    def system(self, text: str | None) -> None:
        self.messages[: self._has_system] = [{"role": "system", "content": text}] if text else []

    @property
    def on_full(self) -> str:
        """What happens to a conversation longer than the context."""
        return self._on_full

    @on_full.setter
    def on_full(self, way: str) -> None:
        check_way(way)
        self._on_full = way

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, a copy."""
        return dict(self._options)

    def configure(self, **options: Any) -> None:
        """Change options of the turns to come; None takes back what was given. A ValueError changes nothing."""
        changed = {name: value for name, value in {**self._options, **options}.items() if value is not None}
        self._config(changed)
        self._options = changed

    def say(self, text: str, on_prefill: Progress | None = None) -> Generator[Event, None, None]:
        """Answer a message of the user, event by event; both are in `messages` once the first event has come.

        An iteration that is broken off leaves what came of the answer; one broken off before the first event, or never
        begun, leaves nothing of the turn. ValueError at once for a message that is empty, that the template refuses or
        that the context has no room for.
        """
        if self._answering:
            raise ValueError("the conversation is in the middle of an answer, finish or close that first")
        if not text.strip():
            raise ValueError("the message is empty, expected some text")
        config = self._config(self._options)
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        fitted = fit(messages, self._encode, self.on_full, self.model.max_length, config.max_new_tokens)
        turn = Turn(
            prompt=self._render(fitted.messages),
            tokens=len(fitted.ids),
            reused=0,
            dropped=len(messages) - len(fitted.messages),
            slid=fitted.slid,
        )
        return self._answer(fitted.messages, fitted.ids, turn, config, on_prefill)

    def answer(self, text: str) -> str:
        """The answer to a message of the user; see `say`."""
        return "".join(event.text for event in self.say(text))

    def undo(self) -> str:
        """Take the user's last message and its answer back; returns the message. ValueError where there is none."""
        place = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if place is None:
            raise ValueError("there is no turn to undo")
        text = self.messages[place]["content"]
        del self.messages[place:]
        return text

    def reset(self) -> None:
        """Begin anew, with the same system message and options."""
        del self.messages[self._has_system :]

    def copy(self) -> "Conversation":
        """A branch: a conversation that goes on from here with messages and a cache of its own."""
        if self._answering:
            raise ValueError("the conversation is in the middle of an answer, finish or close that first")
        other = copy.copy(self)
        other.messages = copy.deepcopy(self.messages)
        other.template_variables, other._options = dict(self.template_variables), dict(self._options)
        other.report, other._cache = Report(), self._cache.copy()
        return other

    def save(self, path: str | Path, cache: str | Path | None = None) -> None:
        """Write the messages as JSON: {"messages": [{"role": ..., "content": ...}, ...]}.

        cache: where to write a prompt cache as well, so that `load` need not compute anything again.
        """
        if cache is not None:
            # What the next turn will begin with, whatever it says: sliding layers could not go back to it in a file.
            held = self._cache.as_prompt_cache(self._encode([*self.messages, {"role": "user", "content": "x"}]))
            save_prompt_cache(Path(cache), self.model, held.cache, held.ids, rope_length=held.rope_length)
        save_messages(Path(path), self.messages)

    def load(self, path: str | Path, cache: str | Path | None = None) -> None:
        """Take over the messages that `save` wrote, system message and all; with `cache`, its prompt cache as well.

        A ValueError changes nothing, but under a memory budget, which has no room for two, the cache held is let go.
        """
        messages = load_messages(Path(path))
        if cache is not None:
            if self.model.storage.positions is not None:
                self._cache = KeptCache(self.model)
            self._cache.adopt(load_prompt_cache(Path(cache), self.model), self._capacity)
        self.messages[:] = messages

    def _answer(
        self, messages: list[Message], ids: list[int], turn: Turn, config: GenerationConfig, on_prefill: Progress | None
    ) -> Generator[Event, None, None]:
        layers, reused = self._cache.reuse(ids, self._capacity, config.prompt_lookup_num_tokens)
        self.turn, self.report = replace(turn, reused=reused), Report()
        answer: Message = {"role": "assistant", "content": ""}
        done, tokens, torn = reused, list[int](), True

        def prefilled(columns: int, total: int) -> None:
            nonlocal done
            done = columns
            if columns == total:
                self._cache.mark()
            if on_prefill:
                on_prefill(columns, total)

        self._answering = True
        try:
            for event in generate(self.model, [ids], config, report=self.report, on_prefill=prefilled, cache=layers):
                if not tokens:
                    self.messages[:] = [*messages, answer]
                tokens.append(event.token_id)
                answer["content"] += event.text
                torn = False
                yield event
                torn = True
            torn = False
        finally:
            self._answering = False
            # The last token was never put into the cache.
            self._cache.keep([*ids, *tokens[:-1]] if tokens else ids[:done], torn)

    @property
    def _has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.model.tokenizer is None:
            raise ValueError("the model has no tokenizer, which a conversation needs")
        return self.model.tokenizer

    def _config(self, options: Mapping[str, Any]) -> GenerationConfig:
        model = self.model
        return generation_options(model.generation_config, model.tokenizer, model.config.vocab_size, **options)

    def _render(self, messages: Sequence[Message]) -> str:
        return self._tokenizer.render([self._wrapped(message) for message in messages], **self.template_variables)

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.encode(self._render(messages), add_special_tokens=False)

    def _wrapped(self, message: Message) -> Message:
        """A user's message with nntr_config.json's head and tail, unless those do the chat template's work."""
        head, tail = self.model.runtime_config.head_prompt, self.model.runtime_config.tail_prompt
        if message["role"] != "user" or self._tokenizer.carries_special_tokens(head + tail):
            return message
        return {**message, "content": head + message["content"] + tail}
