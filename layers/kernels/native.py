"""The native kernels, where the package was installed with a C compiler: loading them and calling them.

They take work to the OpenMP threads that torch already has (`torch.set_num_threads`), so that no second pool spins.
"""

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

KINDS = {
    kind: number
    for number, kind in enumerate("F32 BF16 F16 Q8_0 Q4_0 Q4_K Q6_K Q4_1 Q5_0 Q5_1 IQ4_NL Q3_K Q5_K IQ4_XS".split())
}
"""enum kind of processors.h."""
FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PLAIN, AVX2, AVX_VNNI, AVX512 = 0, 1, 2, 3
ROUTE, USE, SUM = 1, 2, 3
TEAM = ("GOMP_parallel", "omp_get_num_threads")

Address, Size = ctypes.c_void_p, ctypes.c_long
SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "causallm_choose": (ctypes.c_char_p, [ctypes.c_int]),
    "causallm_has_panels": (ctypes.c_int, []),
    "causallm_threads_with": (None, [Address, Address]),
    "causallm_linear": (
        ctypes.c_int,
        [ctypes.c_int, Address, Size, Size, Address, ctypes.c_int, Size, Address, ctypes.c_int],
    ),
    "causallm_expand": (None, [ctypes.c_int, Address, Size, Size, Address, Address, ctypes.c_int]),
    "causallm_attend": (ctypes.c_int, [Address, ctypes.c_int, ctypes.c_int]),
    "causallm_attends_many": (ctypes.c_int, []),
    "causallm_attend_many": (ctypes.c_int, [Address, ctypes.c_int]),
    "causallm_halves": (ctypes.c_int, [Address, ctypes.c_int, Address, ctypes.c_int]),
    "causallm_mixture": (ctypes.c_int, [ctypes.c_int, Address, Address, ctypes.c_int]),
    "causallm_normalise": (
        ctypes.c_int,
        [Address, Address, ctypes.c_int, Size, Size, Address, ctypes.c_int, ctypes.c_int],
    ),
    "causallm_gate": (ctypes.c_int, [ctypes.c_int, Address, Address, Size, Address, ctypes.c_int, ctypes.c_int]),
    "causallm_turn": (
        ctypes.c_int,
        [Address, Address, Address, Address, ctypes.c_int, Size, Size, Address, ctypes.c_int],
    ),
}


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, the best for this processor chosen; None where there are none, with a warning once."""
    built = sorted(path for path in Path(__file__).parent.glob("_native*") if path.suffix in (".so", ".pyd", ".dylib"))
    if not built:
        return None
    try:
        return loaded_from(built[-1])
    except (OSError, AttributeError) as error:
        warnings.warn(f"the native kernels cannot be used, torch's operators are: {error}", stacklevel=2)
        return None


def loaded_from(path: Path) -> ctypes.CDLL:
    """The kernels of a file, the best for this processor chosen; OSError or AttributeError where it is no such file."""
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.causallm_choose(AVX512)
    if team := _team():
        loaded.causallm_threads_with(*team)
    return loaded


def choose(level: int) -> str:
    """Use kernels for at most this `level` of processor, for tests; returns their name, or "torch" without any."""
    loaded = library()
    if loaded is None:
        return "torch"
    return loaded.causallm_choose(level).decode()


def has_panels() -> bool:
    """Whether there are kernels that multiply packed weights with many rows, faster than torch does expanded ones."""
    return (loaded := library()) is not None and bool(loaded.causallm_has_panels())


def run_halves(halves: ctypes.Array, count: int, tokens: ctypes.Structure) -> None:
    """Let the tokens pass through `count` halves of decoder blocks (`layers.kernels.half_arguments`)."""
    if kernels().causallm_halves(halves, count, ctypes.byref(tokens), torch.get_num_threads()):
        raise MemoryError(f"no memory for the working space of {count} halves of blocks")


def mixture_step(step: int, half: ctypes.Structure, tokens: ctypes.Structure) -> None:
    """ROUTE, USE or SUM of a mixture whose experts are fetched (`layers.kernels.half_arguments`)."""
    if kernels().causallm_mixture(step, ctypes.byref(half), ctypes.byref(tokens), torch.get_num_threads()):
        raise MemoryError("no memory for the working space of a mixture of experts")


def normalise(norm: ctypes.Structure, x: Tensor, out: Tensor) -> None:
    """Rows of x through a norm (`layers.kernels.half_arguments`) into `out`; both contiguous."""
    width = x.shape[-1]
    kinds = KINDS[FLOATS[x.dtype]], KINDS[FLOATS[out.dtype]]
    if kernels().causallm_normalise(
        ctypes.byref(norm),
        x.data_ptr(),
        kinds[0],
        x.numel() // width,
        width,
        out.data_ptr(),
        kinds[1],
        torch.get_num_threads(),
    ):
        raise MemoryError(f"no memory for the norm of rows of {width}")


def gate(activation: int, gate: Tensor, up: Tensor, out: Tensor) -> None:
    """activation(gate) * up into `out`, all contiguous and of one dtype; `activation` as in struct mlp_half."""
    addresses = gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr()
    if kernels().causallm_gate(activation, *addresses, KINDS[FLOATS[gate.dtype]], torch.get_num_threads()):
        raise MemoryError("no memory for an activation")


def turn(half: ctypes.Structure, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Heads normalised and rotated: queries (batch, time, width) into `out`, keys and values into the cache."""
    addresses = [part.data_ptr() for part in (query, key, value)]
    kind, (batch, time) = KINDS[FLOATS[query.dtype]], query.shape[:2]
    if kernels().causallm_turn(
        ctypes.byref(half), *addresses, kind, batch, time, out.data_ptr(), torch.get_num_threads()
    ):
        raise MemoryError(f"no memory for heads of {out.shape[-1]}")


def kernels() -> ctypes.CDLL:
    """`library`, for those who have made sure that there is one."""
    loaded = library()
    assert loaded is not None
    return loaded


def _team() -> tuple[int, int] | None:
    """Addresses of GOMP_parallel and omp_get_num_threads in the OpenMP library that torch has loaded, if there."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        try:
            loaded = ctypes.CDLL(str(path))
            begin, size = (ctypes.cast(getattr(loaded, name), Address).value for name in TEAM)
        except (OSError, AttributeError):
            continue
        if begin and size:
            return begin, size
    return None


def linear(rows: Tensor, weight: Tensor, kind: str) -> Tensor:
    """rows (tokens, columns) of a dtype in FLOATS times W^T, packed or float: (tokens, out_features) of that dtype."""
    loaded = kernels()
    tokens, columns = rows.shape
    rows, weight, out = rows.contiguous(), weight.contiguous(), rows.new_empty(tokens, weight.shape[0])
    failed = loaded.causallm_linear(
        KINDS[kind],
        weight.data_ptr(),
        weight.shape[0],
        columns,
        rows.data_ptr(),
        KINDS[FLOATS[rows.dtype]],
        tokens,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a product of {tokens} rows of {columns}")
    return out


def expand(weight: Tensor, kind: str, columns: int, dtype: torch.dtype) -> Tensor:
    """A packed weight as fp32 or bf16, (rows, columns)."""
    loaded = kernels()
    out = torch.empty(weight.shape[0], columns, dtype=dtype)
    wide, narrow = (out.data_ptr(), None) if dtype == torch.float32 else (None, out.data_ptr())
    loaded.causallm_expand(
        KINDS[kind], weight.data_ptr(), weight.shape[0], columns, wide, narrow, torch.get_num_threads()
    )
    return out
