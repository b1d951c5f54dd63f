"""Text to ids and back, from a model folder's tokenizer.json and the settings beside it."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from causallm.chat_template import ChatTemplate, load_chat_template
from causallm.config.json_file import read_json
from causallm.special_tokens import FIELDS, extra_tokens, named_tokens, read_tokenizer_config, tokens_to_add

# Made for WordPiece; transformers applies these in this order, and never to a BPE tokenizer unless forced.
CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
FORCED_CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


class Tokenizer:
    """A `tokenizers` backend with the special tokens, prompt rules and chat template that belong to it.

    Ids, decoded text and rendered conversations are those of transformers' PreTrainedTokenizerFast for the
    same folder. `named_tokens` are those that have a role, {"eos_token": "</s>", ...}: what a chat template
    is given; `special_tokens` all that count as special, `special_ids` those that decoding may skip,
    `cleans_up` whether it moves punctuation to the word before it.
    """

    def __init__(
        self,
        file: Path,
        backend: Backend,
        config: dict[str, Any],
        chat_template: ChatTemplate | None,
        content: Callable[[], dict[str, Any]],
    ) -> None:
        """Takes over `backend`, made from `file`; `config` is tokenizer_config.json's content, completed by the older
        files, and `content` gives tokenizer.json's when it is asked for."""
        self._file, self._stamp, self._content = file, _stamp(file), content
        self._backend = backend
        if backend.padding is not None:
            config.setdefault("pad_token", backend.padding["pad_token"])
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))

        named, extra = named_tokens(config), extra_tokens(config)
        backend.add_tokens(tokens_to_add(backend, config, list(named.values()), extra))
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in self._added.items() if token.special)
        self.special_tokens = frozenset(token.content for token in (*self._added.values(), *extra) if token.special)
        self.named_tokens = {name: token.content for name, token in named.items()}
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = (
            self.named_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        self.bos_id, self.eos_id, self.pad_id = (
            None if token is None else self.token_id(token)
            for token in (self.bos_token, self.eos_token, self.pad_token)
        )
        self._add_bos = config.get("add_bos_token") is True
        self._add_eos = config.get("add_eos_token") is True
        self.cleans_up = bool(config.get("clean_up_tokenization_spaces")) and (
            not isinstance(backend.model, BPE) or bool(config.get(FORCED_CLEAN_UP))
        )
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, folder: Path, tokenizer_file: str | None = None) -> "Tokenizer":
        """Reads tokenizer.json and, where they exist, the configuration and the chat template beside it.

        `tokenizer_file` names another tokenizer.json, in `folder` or anywhere; where it does not exist (a
        path of somebody else's machine) its base name is looked for in `folder`. The other files are read
        from `folder`, or from where the tokenizer file lies if only that place has a tokenizer_config.json.

        Raises:
            FileNotFoundError: no tokenizer file; says what was looked for.
            ValueError: a file is not what it should be; names the file, and the line of broken JSON.
        """
        file = _find_file(folder, tokenizer_file)
        elsewhere = not (folder / "tokenizer_config.json").is_file()
        companions = file.parent if elsewhere else folder
        config = read_tokenizer_config(companions)
        template = load_chat_template(companions, config)
        return cls(file, _read_backend(file), config, template, lambda: read_json(file))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of `text`, with what tokenizer.json's post-processor adds unless told not to.

        A rendered conversation already carries its special tokens: encode it without adding any.
        """
        return self._encode(text, add_special_tokens).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a prompt: as `encode`, but with exactly the BOS and EOS that are expected.

        tokenizer_config's `add_bos_token` and `add_eos_token`, when true, are obeyed where the post-processor
        does not do so, and no BOS is put before a text that begins with it.
        """
        encoding = self._encode(text, True)
        added = encoding.special_tokens_mask
        before = added.index(0) if 0 in added else len(added)
        after = before + added.count(0)
        prefix, body, suffix = encoding.ids[:before], encoding.ids[before:after], encoding.ids[after:]
        if self._add_bos and self.bos_id is not None and self.bos_id not in prefix:
            prefix = [self.bos_id, *prefix]
        if self._add_eos and self.eos_id is not None and self.eos_id not in prefix + suffix:
            suffix = [*suffix, self.eos_id]
        if body[: len(prefix)] == prefix:
            prefix = []
        elif body[:1] == [self.bos_id]:
            prefix = [index for index in prefix if index != self.bos_id]
        return prefix + body + suffix

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`; ids that the tokenizer does not know contribute nothing."""
        text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self.cleans_up:
            for spaced in CLEAN_UP:
                text = text.replace(spaced, spaced.strip())
        return text

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token as the vocabulary spells it."""
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """Returns a token as the vocabulary spells it, or None for an id beyond it."""
        return self._backend.id_to_token(token_id)

    def vocabulary(self) -> dict[str, int]:
        """Returns every token with its id, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included; a model's embedding is often padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def render(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Returns the conversation as the model's chat template writes it; see `ChatTemplate.render`.

        `variables` may be `tools`, `documents` and what else the template reads (`enable_thinking`).

        Raises:
            ValueError: the model has no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise ValueError(
                f"no chat template beside {self._file}: expected chat_template.jinja, or chat_template in "
                "tokenizer_config.json; use a plain prompt instead"
            )
        return self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, **{**self.named_tokens, **variables}
        )

    def carries_special_tokens(self, text: str) -> bool:
        """Whether `text` is wrapped already: it holds a special token, or a mark that the template sets."""
        return any(mark in text for mark in self._turn_marks)

    def backend_json(self) -> dict[str, Any]:
        """Returns tokenizer.json's content as the library writes it, added tokens and all."""
        content: dict[str, Any] = json.loads(self._backend.to_str())
        return content

    @property
    def adds(self) -> tuple[bool, bool]:
        """Whether a prompt gets a BOS before and an EOS after it."""
        ids = self.encode_prompt("x")
        return self.bos_id is not None and ids[:1] == [self.bos_id], ids[-1:] == [self.eos_id] and ids != [self.eos_id]

    def fingerprint(self) -> str:
        """Returns a sha256 in hex of all that decides ids: tokenizer.json's content and the special tokens.

        The order of JSON keys and white space do not matter, nor do truncation and padding, which are never
        applied.

        Raises:
            ValueError: tokenizer.json has changed since it was read.
        """
        if self._stamp != _stamp(self._file):
            raise ValueError(f"{self._file} has changed since it was read, load the model again")
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        content = self._content()
        content["truncation"] = content["padding"] = None
        added = [[index, *(getattr(token, field) for field in FIELDS)] for index, token in sorted(self._added.items())]
        rules = [self._add_bos, self._add_eos, self._backend.encode_special_tokens, self.cleans_up]
        canonical = json.dumps([content, added, self.named_tokens, rules], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def _turn_marks(self) -> frozenset[str]:
        marks = {token for token in self.special_tokens if token.strip()}
        if self.chat_template is not None:
            try:
                turn = self.render([{"role": "user", "content": "x"}], add_generation_prompt=False)
            except ValueError:
                return frozenset(marks)
            contents = (token.content for token in self._added.values())
            marks.update(content for content in contents if content.strip() and content in turn)
        return frozenset(marks)

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise ValueError("the text is not valid Unicode: it holds half of a surrogate pair") from None


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _find_file(folder: Path, tokenizer_file: str | None) -> Path:
    named = tokenizer_file or "tokenizer.json"
    base_name = re.split(r"[/\\]", named)[-1]
    candidates = list(dict.fromkeys((folder / named, folder / base_name)))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    hint = ""
    if (folder / "tokenizer.model").is_file():
        hint = "; tokenizer.model is not read, let transformers write a tokenizer.json from it"
    raise FileNotFoundError(f"no tokenizer: looked for {' and '.join(map(str, candidates))}{hint}")


def _read_backend(file: Path) -> Backend:
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        read_json(file)
        raise ValueError(f"{file}: not a tokenizer that the tokenizers library reads: {error}") from error
