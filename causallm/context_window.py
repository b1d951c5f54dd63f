"""What becomes of a conversation that is longer than the model's context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from causallm.prompt_cache.reuse import common_prefix
from causallm.transcript import Message, without_oldest_turn

WAYS = ("refuse", "drop", "slide")
"""refuse: a ValueError. drop: the oldest turns leave the conversation. slide: its oldest tokens leave what the model
sees; the conversation keeps them."""

Encode = Callable[[Sequence[Message]], list[int]]


@dataclass(frozen=True)
class Fitted:
    """What the model is given: the messages that are left, their tokens, and how many tokens of them were left out."""

    messages: list[Message]
    ids: list[int]
    slid: int = 0


def check_way(on_full: str) -> None:
    """ValueError for what is none of `WAYS`."""
    if on_full not in WAYS:
        raise ValueError(f"on_full: got {on_full!r}, expected {', '.join(WAYS[:-1])} or {WAYS[-1]}")


def fit(messages: Sequence[Message], encode: Encode, on_full: str, context: int, new_tokens: int) -> Fitted:
    """Messages that end with the user's, so that an answer fits into a context of so many tokens.

    "drop" and "slide" leave room for `new_tokens`, but no more than half of the context; "refuse" for one. What cannot
    be fitted is a ValueError that names the sizes.
    """
    ids = encode(messages)
    room = max(context - new_tokens, context // 2)
    if on_full == "drop":
        while len(ids) > room and len(shorter := without_oldest_turn(messages)) < len(messages):
            messages, ids = shorter, encode(shorter)
    elif on_full == "slide" and len(ids) > room:
        return _slide(messages, ids, encode, room)
    if len(ids) >= context:
        other = 'undo turns, begin anew, or choose on_full="drop" (--on-full drop)'
        remedy = "shorten the last message" if on_full == "drop" else other
        raise ValueError(
            f"the conversation has {len(ids)} tokens, but the context is {context} tokens, of which at least one is "
            f"to be generated; {remedy}"
        )
    return Fitted(list(messages), ids)


def _slide(messages: Sequence[Message], ids: list[int], encode: Encode, room: int) -> Fitted:
    """The tokens without the oldest after the system message, in whole steps of half of what `room` leaves beside it.

    As llama.cpp's context shift, but what is kept is computed anew, and so is exact. In steps, so that it is computed
    once in many turns.
    """
    first = [message for message in messages if message["role"] == "system"]
    begun = (encode([*first, {"role": "user", "content": text}]) for text in ("a", "b"))
    head = common_prefix(*begun)
    step = (room - head) // 2
    if step < 1:
        raise ValueError(
            f"the system message has {head} tokens and leaves no room for a conversation: of the context, {room} "
            "tokens are for the prompt; shorten it"
        )
    slid = -(-(len(ids) - room) // step) * step
    return Fitted(list(messages), ids[:head] + ids[head + slid :], slid)
