"""Drafts of what may come next, copied from where the last tokens occurred before: speculation without a second model.

Prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding; transformers' `prompt_lookup_num_tokens`.
"""

from collections.abc import Iterable, Sequence

import torch

from layers.rope import Rope, inverse_frequencies


class PromptLookup:
    """Copies what followed the latest earlier occurrence of a sequence's last tokens.

    `tokens` is the sequence itself, prompt and output, which may grow between calls. Its last `longest` tokens are
    looked for, then fewer. Each token is entered into an index once, in O(longest) time and memory, and a search costs
    as much, however long the sequence is.

    A draft has at most `most` tokens: one at first, twice as many after one that came true, and one more than came true
    of one that did in part. After one of which nothing did, drafts are only compared with what comes, which costs
    nothing, until one would have been right. So text that repeats nothing comes hardly slower than without drafts.
    """

    def __init__(self, tokens: Sequence[int], longest: int, most: int) -> None:
        self._tokens, self._longest, self._most = tokens, longest, most
        self._length = 1
        self._guess: int | None = None
        self._indexed = 0
        self._following: dict[tuple[int, ...], int] = {}

    @property
    def length(self) -> int:
        """How many tokens the next draft may have."""
        return self._length

    def draft(self, room: int) -> list[int]:
        """What may come next, no more than `room` and `length` tokens; none where nothing like the end is found.

        Copying goes on into what has been copied, so that a repetition shorter than the draft is continued.
        """
        self._enter_new()
        self._guess = None
        tokens, end = self._tokens, len(self._tokens)
        for size in range(min(self._longest, end), 0, -1):
            start = self._following.get(tuple(tokens[end - size :]))
            if start is not None:
                self._guess = tokens[start]
                return [tokens[start + step % (end - start)] for step in range(min(self._length, room))]
        return []

    def learn(self, drafted: int, accepted: int) -> None:
        """Take into account how much of a draft came true, once `tokens` has what came."""
        if not drafted:
            self._length = max(self._length, int(self._tokens[-1] == self._guess))
        elif accepted == drafted:
            self._length = min(2 * self._length, self._most)
        else:
            self._length = accepted + 1 if accepted else 0

    def _enter_new(self) -> None:
        """Note for each token that is new at which place it follows the tokens before it."""
        for place in range(self._indexed, len(self._tokens)):
            for size in range(1, min(self._longest, place) + 1):
                self._following[tuple(self._tokens[place - size : place])] = place
        self._indexed = len(self._tokens)


def rotates_alike(ropes: Iterable[Rope], first: int, last: int) -> bool:
    """Whether sequences of `first` and `last` tokens have the same rotary frequencies, so that one step may span both.

    The kinds that depend on the length rotate each token of plain decoding for the length it makes: "longrope" changes
    once, "dynamic" with every token beyond the trained length.
    """
    return all(
        torch.equal(inverse_frequencies(rope, first), inverse_frequencies(rope, last))
        for rope in ropes
        if rope.depends_on_length
    )
