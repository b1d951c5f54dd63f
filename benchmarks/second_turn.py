"""Time to the first token of a conversation's second turn: cache kept, all computed anew, and beside transformers.

    python tools/make_random_model.py qwen3-0.6b -o qwen3-random
    python benchmarks/second_turn.py qwen3-random

All three work on the same tokens, in one process, in turns; medians of the rounds after one that warms up. Ours is what
a user waits for: rendering, tokenizing, prefill and the choice of a token. transformers is its forward pass alone, with
a DynamicCache that holds the first turn, its answer and nothing to be cut off: the least that it can take.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from causallm import load_model
from causallm.chat_template import ChatTemplate
from causallm.conversation import Conversation

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = "The cat sat on the mat and looked at the dog that sat on the log. "
SECOND = "And what did they do then? Tell me."
ANSWER = 32


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1000, help="of the conversation when the second turn begins")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.folder, dtype=args.dtype)
    first, ids = first_turn(model, args.tokens)
    held = len(first._cache.ids)
    theirs = transformers_turns(args.folder, args.dtype, ids, held)
    ways: dict[str, Callable[[], float]] = {
        "causallm, cache kept": lambda: our_turn(first.copy()),
        "causallm, computed anew": lambda: our_turn(without_cache(first)),
        **theirs,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_number, name in tqdm(list(itertools.product(range(args.rounds + 1), ways)), disable=None):
        seconds = ways[name]()
        if round_number:
            times[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    kept = medians["causallm, cache kept"]
    size = f"{len(ids) - held} new tokens after {held}, {args.dtype}"
    print(f"\n| second turn, {size} | first token, ms | of the first |")
    print("| --- | --- | --- |")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds * 1e3:.1f} | {seconds / kept:.2f} |")


def first_turn(model: Any, tokens: int) -> tuple[Conversation, list[int]]:
    """A conversation after its first turn, and the tokens of the second's prompt, which begin with those it holds.

    Of a random model, whose tokenizer knows bytes and has no template, answers are made letters, which are written as
    they were generated.
    """
    letters = [model.tokenizer.token_id(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    model.tokenizer.chat_template = ChatTemplate(TEMPLATE)
    options = {"do_sample": False, "max_new_tokens": ANSWER, "logit_bias": [(letter, 1e4) for letter in letters]}
    text = ""
    while count(model, text) < tokens - ANSWER:
        text += WORDS[len(text) % len(WORDS)]
    conversation = Conversation(model, **options)
    conversation.answer(text)
    assert conversation.turn is not None
    our_turn(branch := conversation.copy())
    assert branch.turn is not None
    held = len(conversation._cache.ids)
    if branch.turn.reused != held:
        raise ValueError(f"the answer is not written as it was generated: {branch.turn.reused} of {held} tokens kept")
    return conversation, branch._cache.ids[: branch.turn.tokens]


def count(model: Any, text: str) -> int:
    """Tokens of a first turn."""
    prompt = model.tokenizer.render([{"role": "user", "content": text}])
    return len(model.tokenizer.encode(prompt, add_special_tokens=False))


def without_cache(conversation: Conversation) -> Conversation:
    """The same messages, of which nothing has been computed."""
    other = Conversation(conversation.model, **conversation.options)
    other.messages[:] = conversation.messages
    return other


def our_turn(conversation: Conversation) -> float:
    """Seconds to the first token."""
    begin = time.perf_counter()
    events = conversation.say(SECOND)
    next(events)
    seconds = time.perf_counter() - begin
    events.close()
    return seconds


@torch.inference_mode()
def transformers_turns(folder: str, dtype: str, ids: list[int], held: int) -> dict[str, Callable[[], float]]:
    """The same second turn with transformers (SDPA attention), with a cache that is kept and with a new one."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    kept = transformers.DynamicCache(config=model.config)
    model(torch.tensor([ids[:held]]), past_key_values=kept, logits_to_keep=1)

    @torch.inference_mode()
    def turn(cache: Any, new: list[int]) -> float:
        begin = time.perf_counter()
        model(torch.tensor([new]), past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax().item()
        return time.perf_counter() - begin

    def with_kept() -> float:
        seconds = turn(kept, ids[held:])
        kept.crop(held - len(ids))
        return seconds

    return {
        "transformers, cache kept": with_kept,
        "transformers, computed anew": lambda: turn(transformers.DynamicCache(config=model.config), ids),
    }


if __name__ == "__main__":
    main()
