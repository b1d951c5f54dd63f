"""What was brought in from the disk, and how long it took."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StorageCounts:
    """Sums since the model was loaded.

    read_bytes: from files while running. read_seconds: in which a read was under way. waited_seconds: in which the
    computation waited for one. passes: over all blocks. hits, misses: experts asked for that were in memory, or not.
    """

    read_bytes: int = 0
    read_seconds: float = 0.0
    waited_seconds: float = 0.0
    passes: int = 0
    hits: int = 0
    misses: int = 0

    def __add__(self, other: "StorageCounts") -> "StorageCounts":
        return StorageCounts(*(one + more for one, more in zip(_values(self), _values(other), strict=True)))

    def __sub__(self, earlier: "StorageCounts") -> "StorageCounts":
        """What was added since `earlier`."""
        return StorageCounts(*(now - then for now, then in zip(_values(self), _values(earlier), strict=True)))

    @property
    def read_rate(self) -> float:
        """Bytes a second while reading."""
        return self.read_bytes / self.read_seconds if self.read_seconds else 0.0

    @property
    def hit_rate(self) -> float | None:
        """The share of experts that were in memory; None where there are no experts to be fetched."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


def _values(counts: StorageCounts) -> tuple:
    return tuple(getattr(counts, name) for name in counts.__dataclass_fields__)
