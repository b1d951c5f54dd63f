"""Where the tensors of a unit lie in memory, and which reads bring them there."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from causallm.storage.disk import Disk
from causallm.storage.experts import ExpertShape
from causallm.storage.layout import GAP, Layout, Piece, lay_out
from causallm.weights.reader import FileRange
from layers.pages import PAGE, Pages

A, B = Path("a"), Path("b")


def piece(name: str, path: Path | None, offset: int, count: int, stored: torch.dtype = torch.uint8) -> Piece:
    place = FileRange(path, offset, count * stored.itemsize) if path else None
    return Piece(name, None, (count,), torch.uint8 if stored == torch.uint8 else torch.float32, stored, place)


def covered(layout: Layout) -> None:
    """Each plain piece lies in one span, at the same distance from its beginning in the file and in memory; nothing
    overlaps."""
    for one, start in zip(layout.pieces, layout.starts, strict=True):
        if one.plain:
            assert one.place is not None
            (span,) = [
                span
                for span in layout.spans
                if span.path == one.place.path
                and span.offset <= one.place.offset
                and one.place.offset + one.place.nbytes <= span.offset + span.nbytes
                and start - span.start == one.place.offset - span.offset
            ]
            assert span.offset % PAGE == span.start % PAGE == span.nbytes % PAGE == 0
    ends = sorted([(start, start + p.nbytes) for p, start in zip(layout.pieces, layout.starts, strict=True)])
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
    spans = sorted((span.start, span.start + span.nbytes) for span in layout.spans)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert max([end for _, end in (*ends, *spans)], default=0) <= layout.nbytes
    assert layout.nbytes % PAGE == 0


def test_neighbours_are_read_at_once_and_a_gap_parts_them() -> None:
    pieces = [
        piece("second", A, 5000, 100),
        piece("first", A, 10, 4990),
        piece("behind a small gap", A, 3 * PAGE + GAP // 2, 10),
        piece("far", A, 10 * GAP + 1, PAGE),
        piece("of another file", B, 5000, 3),
    ]
    layout = lay_out(pieces)
    covered(layout)
    assert [(span.path, span.offset) for span in layout.spans] == [(A, 0), (A, 10 * GAP), (B, PAGE)]
    assert layout.spans[1].nbytes == 2 * PAGE
    assert layout.read_bytes == sum(span.nbytes for span in layout.spans)


def test_the_same_bytes_twice_are_read_once() -> None:
    layout = lay_out([piece("one", A, 100, 50), piece("part of it", A, 100, 20)])
    assert len(layout.spans) == 1
    assert layout.starts[0] == layout.starts[1]


def test_pieces_that_are_computed_lie_behind() -> None:
    pieces = [
        piece("cast", A, 100, 50, torch.bfloat16),
        piece("plain", A, 300, 50),
        piece("unaligned", A, 7, 10, torch.float32),
        piece("nowhere", None, 0, 33, torch.float32),
    ]
    layout = lay_out(pieces)
    covered(layout)
    assert [one.name for one, _ in layout.computed] == ["cast", "unaligned", "nowhere"]
    assert all(start % 64 == 0 for _, start in layout.computed)
    assert layout.read_bytes == PAGE + 100 + 40 + 132


def test_nothing() -> None:
    assert lay_out([]).nbytes == 0
    assert lay_out([]).spans == ()


def test_transposed_pieces_are_strided_in_memory_as_in_the_file(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    memory = Pages(PAGE)
    memory.tensor(0, (2, 3), torch.float32).copy_(values)
    one = Piece("x", None, (3, 2), torch.float32, torch.float32, FileRange(A, 0, 24, True), True)
    assert torch.equal(one.view(memory, 0), values.T)
    fused = Piece("x", 0, (1, 3, 2), torch.float32, torch.float32, None, True)
    assert torch.equal(fused.view(memory, 0)[0], values.T)
    assert fused.view(memory, 0).stride()[1:] == (1, 3)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("first", [0, 8, 64, PAGE - 64, PAGE + 192])
def test_experts_at_any_place_fit_into_a_slot(first: int, direct: bool, tmp_path: Path) -> None:
    """A shape is made for the first expert; the others lie elsewhere in their pages."""
    sizes, count, path = (100, PAGE, 2 * PAGE - 8), 5, tmp_path / "x"
    content = torch.randint(0, 256, (first + count * sum(sizes),), dtype=torch.uint8)
    path.write_bytes(content.numpy().tobytes())
    disk = Disk([path], direct)
    experts, place = [], first
    for _ in range(count):
        pieces = []
        for size in sizes:
            pieces.append(piece("x", path, place, size))
            place += size
        experts.append(pieces)
    template = torch.nn.ParameterList([torch.empty(size, device="meta") for size in sizes])
    shape = ExpertShape.of(template, experts[0])
    for pieces in experts:
        memory = Pages(2 * shape.nbytes)
        places = [(path, p.place.offset, p.place.nbytes) for p in pieces if p.place]
        disk.read_exactly(places, memory, [shape.nbytes + start for start in shape.starts], 0).wait()
        for p, start in zip(pieces, shape.starts, strict=True):
            assert p.place is not None
            found = memory.tensor(shape.nbytes + start, (p.nbytes,), torch.uint8)
            assert torch.equal(found, content[p.place.offset : p.place.offset + p.nbytes])
            assert start % 64 == 0
        assert bytes(memory.view(0, shape.nbytes)) == bytes(shape.nbytes)
    disk.close()
