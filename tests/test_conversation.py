"""Conversations against the same answers computed afresh, whatever happens to cache and transcript between turns.

Models are in float32, where no two likeliest tokens are so close that rounding could swap them.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LENGTH_DEPENDENT, MODELS
from text_models import TEMPLATE, save_text_model

import causallm.conversation
from causallm import load_model
from causallm.config import RuntimeConfig
from causallm.context_window import fit
from causallm.conversation import Conversation
from causallm.prompt_cache import PromptCache, load_prompt_cache
from causallm.storage.storage import Storage
from layers.sliding_cache import SlidingKVCache

# Shapes are checked where the layers and families are tested; to do so again would take most of the time.
pytestmark = pytest.mark.usefixtures("untyped")

TINY_STORIES = Path(__file__).resolve().parents[1] / "res" / "tiny-stories"
SAYINGS = ("Hi!", "Why?", "a cat", "Once upon a time there was", "no", "옛날", "1 2 3", "And then?", "x", "Bye.")
DROPPING = TEMPLATE.replace("message.content", "(message.content if message.role == 'user' else message.content[1:])")
"""A template that, like those that drop earlier thinking, writes earlier answers otherwise than they were given."""


def text_model(folder: Path, name: str = "llama", template: str = TEMPLATE, context: int = 512) -> Any:
    """A random model of a family, with a tokenizer and a chat template."""
    class_name, settings = MODELS[name]
    settings = {"max_position_embeddings": context, **copy.deepcopy(settings)}
    save_text_model(folder, class_name, template=template, **{**settings, "vocab_size": 422, "num_hidden_layers": 4})
    model = load_model(folder)
    model.max_length = context  # beyond what the ropes that depend on the length were made for, without a warning
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return text_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Growing and sliding layers."""
    return text_model(tmp_path_factory.mktemp("sliding"), "qwen3 sliding, tied")


@pytest.fixture(scope="module")
def stories() -> Any:
    return load_model(TINY_STORIES, dtype="float32")


def rendered(conversation: Conversation, *texts: str) -> list[int]:
    """The tokens of what the conversation has, and of these messages of the user after it."""
    tokenizer = conversation.model.tokenizer
    messages = [*conversation.messages, *({"role": "user", "content": text} for text in texts)]
    text = tokenizer.render(messages, **conversation.template_variables)
    return tokenizer.encode(text, add_special_tokens=False)


def afresh(conversation: Conversation, ids: list[int]) -> str:
    """The answer to these tokens, with a cache that is new."""
    return "".join(event.text for event in conversation.model.stream([ids], **conversation.options))


def check_turn(conversation: Conversation, text: str) -> None:
    """One turn, whose answer is that of a fresh prefill."""
    ids = rendered(conversation, text)
    expected = afresh(conversation, ids)
    before = copy.deepcopy(conversation.messages)
    assert conversation.answer(text) == expected
    answered = [{"role": "user", "content": text}, {"role": "assistant", "content": expected}]
    assert conversation.messages == [*before, *answered]
    assert conversation.turn is not None
    assert conversation.turn.tokens == len(ids)
    assert conversation._cache.ids[: len(ids)] == ids
    assert {layer.offset for layer in conversation._cache._layers} == {len(conversation._cache.ids)}


def reused(conversation: Conversation) -> int:
    assert conversation.turn is not None
    return conversation.turn.reused


@torch.inference_mode()
def check_greedy(conversation: Conversation, text: str) -> None:
    """One turn, whose tokens are the likeliest ones in one forward pass over all: quicker than to decode again."""
    ids = rendered(conversation, text)
    events = list(conversation.say(text))
    tokens = [event.token_id for event in events]
    if conversation.model.config.rope(0).depends_on_length or conversation.model.config.rope(1).depends_on_length:
        # Decoding rotates each token for the length that it makes.
        assert afresh(conversation, ids) == "".join(event.text for event in events)
        return
    logits = conversation.model(torch.tensor([ids + tokens[:-1]]), last=len(tokens))[0]
    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_ten_turns_of_every_family(name: str, tmp_path: Path) -> None:
    """A prompt is the beginning of the next, so that at least it is used again, from sliding layers too.

    But for a turn or two whose answer begins with what is one token with the end of the prompt.
    """
    conversation = Conversation(text_model(tmp_path, name, DROPPING), do_sample=False, max_new_tokens=5)
    before, used_again = 0, []
    for text in SAYINGS:
        check_greedy(conversation, text)
        used_again.append(reused(conversation) >= before > 0)
        before = conversation.turn.tokens if conversation.turn else 0
    dynamic = any(conversation.model.config.rope(layer_id).kind == "dynamic" for layer_id in range(2))
    assert sum(used_again) >= 8 - (name in LENGTH_DEPENDENT) or (dynamic and not any(used_again))


def test_a_rope_that_changes_in_the_middle_of_a_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept before and after, longer than what a turn adds; where it changes all is computed anew, from a file too."""
    class_name, settings = copy.deepcopy(MODELS["longrope"])
    settings["rope_parameters"]["original_max_position_embeddings"] = 100
    monkeypatch.setitem(MODELS, "longrope to 100", (class_name, settings))
    conversation = Conversation(text_model(tmp_path, "longrope to 100"), do_sample=False, max_new_tokens=3)
    before, kept = 0, []
    while before < 200:
        conversation.answer("x")
        conversation.undo()
        conversation.save(tmp_path / "talk.json", tmp_path / "talk.cache")
        loaded = Conversation(conversation.model, **conversation.options)
        loaded.load(tmp_path / "talk.json", tmp_path / "talk.cache")
        check_turn(loaded, "x")
        check_turn(conversation, "x")
        assert conversation.turn is not None
        kept.append((before > 100, reused(loaded) > 0))
        before = conversation.turn.tokens
    assert {changed for changed, _ in kept} == {False, True}
    assert all(again for changed, again in kept if changed)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_ten_turns_of_a_template_that_changes_nothing(name: str, tmp_path: Path) -> None:
    conversation = Conversation(text_model(tmp_path, name), "Be kind.", do_sample=False, max_new_tokens=5)
    for text in SAYINGS:
        check_turn(conversation, text)


@pytest.mark.parametrize("options", [{}, {"static_cache": True}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_only_what_is_new_is_computed(stories: Any, options: dict[str, Any]) -> None:
    """An answer of ordinary words is written as it was generated, and is not computed again."""
    conversation = Conversation(stories, do_sample=False, max_new_tokens=12, **options)
    computed: list[int] = []
    hook = stories.register_forward_pre_hook(lambda _, arguments: computed.append(arguments[0].shape[1]))
    held = 0
    try:
        for text in SAYINGS[:4]:
            ids = rendered(conversation, text)
            expected = afresh(conversation, ids)
            computed.clear()
            assert conversation.answer(text) == expected
            assert reused(conversation) == held
            assert computed[0] == len(ids) - held
            held = len(ids) + conversation.report.generated_tokens - 1
    finally:
        hook.remove()


def test_ten_turns_of_the_model_that_is_shipped(stories: Any) -> None:
    conversation = Conversation(stories, do_sample=False, max_new_tokens=12, repetition_penalty=1.0)
    for text in SAYINGS:
        check_turn(conversation, text)


def test_sampled_turns_draw_as_without_a_cache(stories: Any) -> None:
    conversation = Conversation(stories, temperature=0.8, top_k=40, seed=5, max_new_tokens=15, repetition_penalty=1.1)
    for text in SAYINGS[:3]:
        check_turn(conversation, text)


def test_messages_that_were_changed_are_computed_again(sliding: Any) -> None:
    conversation = Conversation(sliding, "Be kind.", do_sample=False, max_new_tokens=6)
    for text in SAYINGS[:3]:
        check_turn(conversation, text)
    conversation.messages[2]["content"] = "What?"
    check_turn(conversation, "Why?")
    conversation.system = "Be brief."
    check_turn(conversation, "Why?")
    conversation.system = None
    assert [message["role"] for message in conversation.messages[:2]] == ["user", "assistant"]
    check_turn(conversation, "Why?")


def test_undo_and_reset(sliding: Any, llama: Any) -> None:
    for model in (sliding, llama):
        conversation = Conversation(model, "Be kind.", do_sample=False, max_new_tokens=6)
        for text in SAYINGS[:3]:
            check_turn(conversation, text)
        before, last = copy.deepcopy(conversation.messages[:-2]), conversation.messages[-1]
        assert conversation.undo() == SAYINGS[2]
        assert conversation.messages == before
        check_turn(conversation, SAYINGS[2])
        assert conversation.messages[-1] == last
        assert model is sliding or reused(conversation) > 0
        conversation.undo(), conversation.undo()
        check_turn(conversation, "Bye.")
        conversation.reset()
        assert conversation.messages == [{"role": "system", "content": "Be kind."}]
        check_turn(conversation, "Bye.")
        conversation.undo()
        with pytest.raises(ValueError, match="no turn to undo"):
            conversation.undo()


def test_branches_go_their_own_ways(sliding: Any) -> None:
    conversation = Conversation(sliding, do_sample=False, max_new_tokens=6, template_variables={"thinking": True})
    for text in SAYINGS[:3]:
        check_turn(conversation, text)
    branch = conversation.copy()
    branch.template_variables["thinking"] = False
    branch.configure(max_new_tokens=3)
    check_turn(branch, "Left.")
    assert reused(branch) > 0
    check_turn(conversation, "Right.")
    assert reused(conversation) == reused(branch)
    check_turn(branch, "Left again.")
    check_turn(conversation, "Right again.")
    assert conversation.options["max_new_tokens"] == 6
    assert conversation.template_variables == {"thinking": True}
    assert [message["content"] for message in branch.messages[6::2]] == ["Left.", "Left again."]


def test_a_conversation_that_was_saved_goes_on(sliding: Any, llama: Any, tmp_path: Path) -> None:
    conversation = Conversation(sliding, "Be kind — 친절.", do_sample=False, max_new_tokens=6)
    for text in SAYINGS[:4]:
        check_turn(conversation, text)
    path = tmp_path / "talk.json"
    path.write_text("what was there before")
    conversation.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text(encoding="utf-8")) == {"messages": conversation.messages}
    other = Conversation(llama, "Be brief.", do_sample=False, max_new_tokens=6)
    check_turn(other, "Hi!")
    other.load(str(path))
    assert other.messages == conversation.messages
    check_turn(other, "Why?")


USER, ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "talk.json:1: broken JSON"),
        ("[]", "talk.json:1: expected a JSON object"),
        ("{}", 'talk.json: expected {"messages": [...]}'),
        ({"messages": [USER, 3]}, "talk.json: message 2 is 3, expected one with role and content"),
        ({"messages": [{"role": "user"}]}, "message 1 is {'role': 'user'}, expected"),
        ({"messages": [ASSISTANT]}, "message 1 has role 'assistant', expected system or user"),
        ({"messages": [USER, USER]}, "message 2 has role 'user', expected assistant"),
        ({"messages": [USER, ASSISTANT, {"role": "system", "content": "z"}]}, "message 3 has role 'system', expected"),
        ({"messages": [USER, ASSISTANT, USER]}, "the last message is the user's"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(llama: Any, tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    conversation = Conversation(llama, "Be kind.")
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the message is compared below
        conversation.load(path)
    assert message in str(raised.value)
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]
    with pytest.raises(FileNotFoundError):
        conversation.load(tmp_path / "missing.json")


@pytest.mark.parametrize("lookup", [0, 3])
def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(sliding: Any, lookup: int) -> None:
    conversation = Conversation(sliding, do_sample=False, max_new_tokens=30, prompt_lookup_num_tokens=lookup)
    check_turn(conversation, "Hi! Hi! Hi!")
    whole = afresh(conversation, rendered(conversation, "Why?"))
    events, part = conversation.say("Why?"), ""
    for _ in range(9):
        part += next(events).text
        assert conversation.messages[-1] == {"role": "assistant", "content": part}
    events.close()
    assert whole.startswith(part)
    assert conversation.messages[-1] == {"role": "assistant", "content": part}
    check_turn(conversation, "And then?")
    assert reused(conversation) > 0


def test_a_turn_that_never_began_leaves_nothing(llama: Any) -> None:
    conversation = Conversation(llama, do_sample=False, max_new_tokens=6)
    check_turn(conversation, "Hi!")
    before = copy.deepcopy(conversation.messages)
    unbegun = conversation.say("Why?")
    assert conversation.messages == before
    check_turn(conversation, "a cat")
    del unbegun


class StopError(Exception):
    """Something that breaks a step off."""


def broken_off(model: Any, layer: int, calls: int) -> Callable[[], None]:
    """Break a forward pass off at a layer, in the so manieth call from now; returns what takes that back."""
    count = iter(range(calls + 1))

    def stop(*_: Any) -> None:
        if next(count) == calls - 1:
            raise StopError

    return model.layers[layer].self_attn.o_proj.register_forward_pre_hook(stop).remove


@pytest.mark.parametrize("lookup", [0, 3])
@pytest.mark.parametrize(("layer", "calls"), [(0, 1), (3, 1), (1, 2), (2, 3), (0, 8), (1, 8), (3, 9)])
def test_a_step_that_is_torn_costs_nothing_but_time(
    sliding: Any, layer: int, calls: int, lookup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the prompt's chunks or in the answer, with some layers ahead of others."""
    monkeypatch.setattr(sliding, "runtime_config", RuntimeConfig(init_seq_len=16))
    conversation = Conversation(sliding, do_sample=False, max_new_tokens=12, prompt_lookup_num_tokens=lookup)
    check_turn(conversation, "Once upon a time there was")
    before = copy.deepcopy(conversation.messages)
    events = conversation.say("Once upon a time there was a girl, and a boy, and a cat.")
    undo = broken_off(sliding, layer, calls)
    with pytest.raises(StopError):
        list(events)
    undo()
    assert len(conversation.messages) == len(before) + (2 if calls > 3 else 0)
    check_turn(conversation, "And then?")
    assert reused(conversation) > 0


FEW = [(token, 8.0) for token in range(300, 304)]
"""A bias towards a few tokens, so that drafts of random text come true now and then."""


@pytest.mark.parametrize("in_answer", [False, True])
@pytest.mark.parametrize("calls", range(4))
def test_what_a_torn_step_may_have_spoilt_is_computed_again(
    sliding: Any, calls: int, in_answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sliding layer kept aside for taking back is of the step before, when a step is broken off there."""
    monkeypatch.setattr(sliding, "runtime_config", RuntimeConfig(init_seq_len=4))
    options = {"do_sample": False, "max_new_tokens": 40, "logit_bias": FEW, "prompt_lookup_num_tokens": 6}
    conversation = Conversation(sliding, **options)
    check_turn(conversation, "Hi!")
    first = conversation.turn
    keep_aside, count = SlidingKVCache._keep_aside, iter(range(1000))

    def stop(self: SlidingKVCache, *columns: torch.Tensor) -> None:
        if bool(conversation.report.first_tokens) == in_answer and next(count) == calls:
            raise StopError
        keep_aside(self, *columns)

    monkeypatch.setattr(SlidingKVCache, "_keep_aside", stop)
    with pytest.raises(StopError):
        list(conversation.say("Hi! Hi! Hi!"))
    monkeypatch.setattr(SlidingKVCache, "_keep_aside", keep_aside)
    # Back to the end of the prompt, or of the one before.
    place = conversation.turn if in_answer else first
    assert place is not None
    assert len(conversation._cache.ids) == place.tokens
    check_turn(conversation, "And then?")


def test_drafts_may_begin_in_the_middle_of_a_conversation(sliding: Any) -> None:
    """The cache of the turns before could not have taken them back."""
    conversation = Conversation(sliding, do_sample=False, max_new_tokens=30, logit_bias=FEW)
    check_turn(conversation, "Hi! Hi! Hi!")
    for length in (4, 0, 6):
        conversation.configure(prompt_lookup_num_tokens=length)
        check_turn(conversation, "Hi! Hi! Hi!")


def test_what_was_computed_of_a_prompt_that_was_broken_off_stays(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "runtime_config", RuntimeConfig(init_seq_len=8))
    conversation = Conversation(llama, do_sample=False, max_new_tokens=4)

    def stop(done: int, total: int) -> None:
        assert total > 24
        if done == 16:
            raise StopError

    with pytest.raises(StopError):
        list(conversation.say("Once upon a time there was a girl.", stop))
    assert conversation.messages == []
    check_turn(conversation, "Once upon a time there was a girl.")
    assert reused(conversation) == 16


def test_one_answer_at_a_time(llama: Any) -> None:
    conversation = Conversation(llama, max_new_tokens=4, do_sample=False)
    events = conversation.say("Hi!")
    next(events)
    for action in (lambda: conversation.say("Why?"), conversation.copy):
        with pytest.raises(ValueError, match="in the middle of an answer"):
            action()
    assert len(list(events)) == 3
    check_turn(conversation, "Why?")


def long_talk(model: Any, on_full: str, turns: int) -> Iterator[Conversation]:
    conversation = Conversation(model, "Be kind.", on_full=on_full, do_sample=False, max_new_tokens=8)
    for number in range(turns):
        conversation.answer(f"{number} {SAYINGS[number % len(SAYINGS)]}")
        yield conversation


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """A context of few turns."""
    return text_model(tmp_path, "mistral", context=128)


def test_a_full_conversation_is_refused_with_the_sizes(small: Any) -> None:
    conversation = Conversation(small, do_sample=False, max_new_tokens=8)
    while len(ids := rendered(conversation, "Why?")) < 128:
        check_turn(conversation, "Why?")
    before = copy.deepcopy(conversation.messages)
    assert len(before) > 4
    with pytest.raises(ValueError, match=f"the conversation has {len(ids)} tokens, but the context is 128 tokens"):
        conversation.say("Why?")
    assert conversation.messages == before
    conversation.undo()
    conversation.undo()
    check_turn(conversation, "Hi!")


@pytest.mark.parametrize("on_full", ["refuse", "drop", "slide"])
def test_one_token_must_fit_after_the_prompt(on_full: str) -> None:
    """Whatever is done about it: a first message of as many tokens as it has characters, in a context of 64."""

    def encode(messages: Sequence[dict[str, str]]) -> list[int]:
        return list("".join(message["content"] for message in messages).encode())

    assert len(fit([{"role": "user", "content": "x" * 63}], encode, on_full, 64, 1).ids) == 63
    for length in (64, 65):
        message = {"role": "user", "content": "x" * length}
        if on_full == "slide":
            assert len(fit([message], encode, on_full, 64, 1).ids) < 64
            continue
        with pytest.raises(ValueError, match=f"has {length} tokens, but the context is 64 tokens"):
            fit([message], encode, on_full, 64, 1)


def test_the_oldest_turns_leave_a_full_conversation(small: Any) -> None:
    fresh = Conversation(small, do_sample=False, max_new_tokens=8)
    dropped = 0
    for number, conversation in enumerate(long_talk(small, "drop", 12)):
        users = [message for message in conversation.messages if message["role"] == "user"]
        assert conversation.messages[0] == {"role": "system", "content": "Be kind."}
        assert [message["role"] for message in conversation.messages[1:]] == ["user", "assistant"] * len(users)
        assert [int(user["content"].split()[0]) for user in users] == list(range(number + 1 - len(users), number + 1))
        assert conversation.turn is not None
        assert conversation.turn.tokens <= 120
        dropped += conversation.turn.dropped
        assert dropped == 2 * (number + 1 - len(users))
        fresh.messages[:] = conversation.messages[:-2]
        assert conversation.messages[-1]["content"] == afresh(fresh, rendered(fresh, users[-1]["content"]))
        # One turn more would not have fitted.
        if dropped:
            assert conversation.turn.tokens + 2 * 12 > 100
    assert dropped > 8
    with pytest.raises(ValueError, match=r"but the context is 128 tokens.*shorten the last message"):
        conversation.say("word " * 200)


def test_a_full_conversation_slides_out_of_sight(small: Any) -> None:
    """What the model sees is the system message and the end, cut at one place for several turns."""
    begin = "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    head = len(small.tokenizer.encode(begin, add_special_tokens=False))
    used_again = slid = 0
    for number, conversation in enumerate(long_talk(small, "slide", 14)):
        earlier = Conversation(small, do_sample=False, max_new_tokens=8)
        earlier.messages[:] = conversation.messages[:-2]
        ids = rendered(earlier, conversation.messages[-2]["content"])
        turn = conversation.turn
        assert turn is not None
        assert turn.slid >= slid
        slid = turn.slid
        kept = ids[:head] + ids[head + slid :]
        assert turn.tokens == len(kept) <= 120
        assert bool(slid) == (len(ids) > 120)
        assert len(conversation.messages) == 2 * number + 3
        assert conversation.messages[-1]["content"] == afresh(earlier, kept)
        used_again += slid > 0 and turn.reused > head
    assert slid > 100
    assert used_again >= 2


def test_what_can_never_fit_is_refused(small: Any) -> None:
    conversation = Conversation(small, "word " * 100, on_full="slide", max_new_tokens=8)
    with pytest.raises(ValueError, match=r"the system message has \d+ tokens and leaves no room"):
        conversation.say("Hi!")


def test_mistakes_are_told_at_once(llama: Any, tmp_path: Path) -> None:
    conversation = Conversation(llama, temperature=0.5)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: conversation.say(" \n"), "the message is empty"),
        (lambda: conversation.say("\ud800"), "not valid Unicode"),
        (lambda: Conversation(llama, on_full="explode"), "on_full: got 'explode', expected refuse, drop or slide"),
        (lambda: Conversation(llama, temperture=1), "unknown option 'temperture'; known are"),
        (lambda: conversation.configure(top_k=2, top_p=7.0), "top_p: got 7.0"),
        (lambda: setattr(conversation, "on_full", "x"), "on_full: got 'x'"),
        (lambda: Conversation(llama, template_variables={"thinking": object()}), "cannot render the object"),
    ]
    for action, message in cases:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            action()
    assert conversation.options == {"temperature": 0.5}
    assert conversation.messages == []
    conversation.configure(temperature=None, top_k=3)
    assert conversation.options == {"top_k": 3}
    save_text_model(tmp_path)
    with pytest.raises(ValueError, match="no chat template beside"):
        Conversation(load_model(tmp_path))


def test_a_template_that_refuses_a_system_message_does_so_at_once(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + TEMPLATE
    model = text_model(tmp_path, template=refusing)
    Conversation(model)
    with pytest.raises(ValueError, match="No system role"):
        Conversation(model, "Be kind.")


def test_head_and_tail_prompts_go_around_each_message(llama: Any, tmp_path: Path) -> None:
    save_text_model(tmp_path, template=TEMPLATE, nntr={"system_prompt": {"head_prompt": "Q: ", "tail_prompt": " A:"}})
    conversation = Conversation(load_model(tmp_path), do_sample=False, max_new_tokens=4)
    conversation.answer("Hi!")
    conversation.answer("Why?")
    assert conversation.turn is not None
    assert "user\nQ: Hi! A:<|im_end|>" in conversation.turn.prompt
    assert "user\nQ: Why? A:<|im_end|>" in conversation.turn.prompt
    assert conversation.messages[2]["content"] == "Why?"
    assert conversation.turn.prompt.startswith("<s><|im_start|>user\nQ: Hi! A:<|im_end|>\n<|im_start|>assistant\n")


def test_a_branch_shares_no_memory(stories: Any) -> None:
    conversation = Conversation(stories, do_sample=False, max_new_tokens=5)
    conversation.answer("Hi!")
    branch = conversation.copy()
    pointers = {layer._keys.data_ptr() for layer in conversation._cache._layers}
    assert not pointers & {layer._keys.data_ptr() for layer in branch._cache._layers}
    check_turn(branch, "Why?")
    check_turn(conversation, "Why not?")


@pytest.mark.parametrize("static", [False, True])
def test_the_cache_is_saved_too(sliding: Any, tmp_path: Path, static: bool) -> None:
    """The file is one that run's and chat's --prompt-cache take."""
    conversation = Conversation(sliding, do_sample=False, max_new_tokens=6)
    with pytest.raises(ValueError, match="no cache to save"):
        conversation.save(tmp_path / "talk.json", tmp_path / "talk.cache")
    for text in SAYINGS[:4]:
        check_turn(conversation, text)
    conversation.save(tmp_path / "talk.json", tmp_path / "talk.cache")
    held = load_prompt_cache(tmp_path / "talk.cache", sliding)
    assert held.ids == [conversation._cache.ids]
    assert {layer.offset for layer in held.cache} == {len(held.ids[0])}
    other = Conversation(sliding, do_sample=False, max_new_tokens=6, static_cache=static)
    other.load(tmp_path / "talk.json", tmp_path / "talk.cache")
    third = Conversation(sliding, do_sample=False, max_new_tokens=6, static_cache=static, prompt_cache=held)
    third.load(tmp_path / "talk.json")
    fourth = Conversation(sliding, do_sample=False, max_new_tokens=6, prompt_cache=held)
    fourth.load(tmp_path / "talk.json")
    check_turn(conversation, "Why?")
    for each in (other, third, fourth):
        check_turn(each, "Why?")
        assert reused(each) == reused(conversation) > 0
    with pytest.raises(ValueError, match="the prompt cache has 2 rows"):
        Conversation(sliding, prompt_cache=PromptCache(held.ids * 2, held.cache))


def test_under_a_budget_there_is_one_cache(sliding: Any, tmp_path: Path) -> None:
    """It has its memory at once, and a prompt cache becomes it."""
    expected = Conversation(sliding, do_sample=False, max_new_tokens=6)
    answers = [expected.answer(text) for text in SAYINGS[:3]]
    model = copy.copy(sliding)
    model.storage = Storage()
    model.storage.positions = model.max_length
    talk = Conversation(model, do_sample=False, max_new_tokens=6)
    assert [talk.answer(text) for text in SAYINGS[:2]] == answers[:2]
    full = [layer.limit for layer in talk._cache._layers if layer.rollback is None]
    assert full == [model.max_length] * len(full) != []
    talk.save(tmp_path / "talk.json", tmp_path / "talk.cache")
    held = load_prompt_cache(tmp_path / "talk.cache", model)
    layers = list(held.cache)
    first, second = (Conversation(model, do_sample=False, max_new_tokens=6, prompt_cache=held) for _ in range(2))
    assert not held.cache
    assert first._cache._layers == layers
    talk.load(tmp_path / "talk.json", tmp_path / "talk.cache")
    for each in (first, second, talk):
        each.load(tmp_path / "talk.json")
        assert each.answer(SAYINGS[2]) == answers[2]
    assert reused(first) == reused(talk) > reused(second) == 0


def test_under_a_budget_the_cache_goes_before_another_is_read(sliding: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model, held = copy.copy(sliding), list[int]()
    model.storage = Storage()
    model.storage.positions = model.max_length
    talk = Conversation(model, do_sample=False, max_new_tokens=6)
    talk.answer(SAYINGS[0])
    talk.save(tmp_path / "talk.json", tmp_path / "talk.cache")

    def load(*arguments: Any) -> Any:
        held.append(talk._cache.nbytes)
        return load_prompt_cache(*arguments)

    monkeypatch.setattr(causallm.conversation, "load_prompt_cache", load)
    talk.load(tmp_path / "talk.json", tmp_path / "talk.cache")
    assert held == [0]
