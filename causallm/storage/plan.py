"""Where the bytes of a model go under a budget: what stays in memory, what is read when it is needed, what else takes
memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from causallm.byte_size import show_bytes

PROGRAMS_DIFFER = 10**6
"""By how much the memory of one verb's program is more than another's (measured: 0.1 MB between plan and bench)."""


@dataclass(frozen=True)
class Line:
    """One purpose: bytes of the model that serve it, 0 where it is none of the model's, and bytes of memory."""

    purpose: str
    model: int
    memory: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a model does with its budget, None where only kinds of storage were asked for.

    streamed: units (blocks by number, `HEAD`) that share the arena. slots: experts in memory. pass_bytes: what a pass
    over all blocks and the head reads of them. positions: of all rows together. direct: whether files are read past
    the system's cache. whole: all is in memory and nothing is read while running.
    """

    budget: int | None
    lines: tuple[Line, ...]
    smallest: int
    whole: bool
    streamed: tuple[int, ...] = ()
    arena_bytes: int = 0
    lookahead: int = 1
    slots: int = 0
    most_experts: int = 0
    pass_bytes: int = 0
    expert_bytes: int = 0
    experts_per_token: int = 0
    expert_count: int = 0
    positions: int = 0
    direct: bool = True

    @property
    def memory(self) -> int:
        """Bytes of memory in all."""
        return sum(line.memory for line in self.lines)

    @property
    def hit_rate(self) -> float:
        """The share of experts found in memory, were all chosen equally often."""
        return min(self.slots / self.expert_count, 1.0) if self.expert_count else 1.0

    @property
    def read_per_token(self) -> float:
        """Bytes from the disk for one token after the prompt, experts chosen equally often."""
        return self.pass_bytes + self.experts_per_token * self.expert_bytes * (1 - self.hit_rate)

    @property
    def enough(self) -> int:
        """The smallest budget for any verb, whose programs differ a little, in digits that are shown of it."""
        smallest = self.smallest + PROGRAMS_DIFFER
        step = 10**7 if smallest > 999_900_000 else 10**5
        return -(-smallest // step) * step

    @property
    def tight(self) -> str | None:
        """What to tell where the experts of one token do not fit."""
        if not self.expert_count or self.whole or self.slots >= self.experts_per_token:
            return None
        missing = show_bytes((self.experts_per_token - self.slots) * self.expert_bytes)
        return (
            f"the budget has room for {self.slots} experts, one token uses {self.experts_per_token}: nearly all are "
            f"read again for every token; {missing} more would hold them"
        )

    def table(self) -> list[str]:
        """The plan as text, a line a purpose."""
        rows = [
            ("", "of the model", "in memory"),
            *((x.purpose, _shown(x.model), _shown(x.memory)) for x in self.lines),
        ]
        rows.append(("together", _shown(sum(line.model for line in self.lines)), _shown(self.memory)))
        notes = ["", *(line.note for line in self.lines), f"budget {show_bytes(self.budget)}" if self.budget else ""]
        width = max(len(row[0]) for row in rows)
        return [
            f"{purpose:<{width}}  {model:>12}  {memory:>10}  {note}".rstrip()
            for (purpose, model, memory), note in zip(rows, notes, strict=True)
        ]


class BudgetError(ValueError):
    """A budget under which a model cannot run; `table` says where the bytes would go."""

    def __init__(self, message: str, table: Sequence[str]):
        super().__init__(message)
        self.table = table


def _shown(nbytes: int) -> str:
    return show_bytes(nbytes) if nbytes else "-"
