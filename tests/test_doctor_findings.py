"""What is found wrong with machines of every kind, and rates against figures worked out by hand."""

import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import causallm.doctor.machine
import causallm.doctor.processor
import causallm.doctor.software
from causallm.available_memory import Memory
from causallm.doctor.findings import Finding, machine_findings, model_findings
from causallm.doctor.limits import WORKSPACE, fits, longest_context, most_rates, resident_rate, streamed_rate
from causallm.doctor.machine import Disk, Machine, examine_disk
from causallm.doctor.needs import Needs, Weights
from causallm.doctor.processor import Kernels, Processor, processor_limit, read_processor
from causallm.doctor.software import Accelerator, accelerators, optional_packages, versions
from causallm.doctor.text import machine_lines, model_lines
from causallm.doctor.units import rate, size

GB = 10**9
PROCESSOR = Processor("Z80", "x86_64", ("AVX2",), 8, 16, None, 8, None)
DISK = Disk(Path("models"), 500 * GB, 90 * GB, 2e9, 1e9)
MACHINE = Machine(PROCESSOR, Kernels("AVX2", True), Memory(32 * GB, 20 * GB, None), 40e9, None, DISK, ())
DENSE = Needs(
    architecture="LlamaForCausalLM",
    parameters=4 * GB,
    dtypes="bfloat16",
    memory=Weights(1 * GB, 7 * GB, 0, 0.0),
    files=Weights(1 * GB, 7 * GB, 0, 0.0),
    missing=None,
    experts=0,
    chosen=0,
    context=32_000,
    windows=(None,) * 8 + (1000,) * 2,
    position_bytes=10_000,
)
MOE = replace(
    DENSE,
    memory=Weights(0, 2 * GB, 32 * GB, 0.125),
    files=Weights(0, 1 * GB, 16 * GB, 0.125),
    experts=64,
    chosen=8,
)


def machine_with(**changes: Any) -> Machine:
    """`MACHINE` but for some fields of it or of its processor."""
    own = {name: value for name, value in changes.items() if hasattr(MACHINE, name)}
    inner = {name: value for name, value in changes.items() if name not in own}
    return replace(MACHINE, **own, **({"processor": replace(PROCESSOR, **inner)} if inner else {}))


def found(machine: Machine, needs: Needs | None = None, folder: bool = True) -> list[str]:
    findings: list[Finding] = machine_findings(machine)
    if needs:
        findings += model_findings(needs, machine, "MODEL", folder)
    return [str(finding) for finding in findings]


def test_a_good_machine_has_no_findings() -> None:
    assert found(MACHINE) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kernels": Kernels("torch", False)}, ("kernels are not built", "install a C compiler")),
        ({"kernels": Kernels("torch", True)}, ("kernels cannot be loaded", "; install causallm again")),
        ({"kernels": Kernels("plain C", True)}, ("(AVX2, FMA and F16C)", "fraction")),
        (
            {"kernels": Kernels("plain C", True), "processor": replace(PROCESSOR, architecture="aarch64")},
            ("(dot product)", "fraction"),
        ),
        ({"threads": 1, "openmp": "1"}, ("torch uses 1 thread of 8 processors (OMP_NUM_THREADS=1)", "--threads 8")),
        ({"threads": 8, "usable": 4}, ("8 threads, but this process may run on 4 processors", "--threads 4")),
        ({"threads": 8, "limit": 2.5}, ("8 threads, but its control group allows 3 processors", "--threads 3")),
        ({"memory": Memory(8 * GB, GB // 2, None)}, ("only 500 MB of memory are available;", "end what else")),
        ({"memory": Memory(8 * GB, GB // 2, 2 * GB)}, ("within the 2.0 GB that the control", "raise the limit")),
        ({"disk": replace(DISK, free=GB // 10)}, ("only 100 MB are free on the disk of models", "make room")),
        ({"bandwidth": None, "failure": "exit code -9"}, ("memory's bandwidth was not measured: exit code -9", "")),
        ({"disk": replace(DISK, failure="Read-only")}, ("disk's bandwidth was not measured: Read-only", "64 MiB")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_each_problem_comes_with_a_remedy(changes: dict[str, Any], told: tuple[str, str]) -> None:
    (line,) = found(machine_with(**changes))
    text, remedy = line[: line.index("; ") + 1], line[line.index("; ") :]
    assert text.startswith("problem: ")
    assert told[0] in text
    assert told[1] in remedy
    assert len(remedy) > 5


def test_threads_of_half_the_cores_are_a_choice() -> None:
    assert found(machine_with(threads=4)) == []
    assert found(machine_with(threads=3)) == ["problem: torch uses 3 threads of 8 processors; --threads 8"]
    assert found(machine_with(threads=4, limit=4.0)) == []
    assert found(machine_with(cores=None, threads=8)) == []


def test_rates_are_bandwidth_over_bytes() -> None:
    """10,000 bytes a token in 8 layers that keep all tokens and 2 that keep 1,000."""
    assert DENSE.cache_bytes(500) == 500 * 10_000 * 10
    assert DENSE.cache_bytes(32_000) == 10_000 * (8 * 32_000 + 2 * 1000)
    assert resident_rate(DENSE, 40e9) == pytest.approx(40 / 7)
    assert resident_rate(DENSE, 40e9, 32_000) == pytest.approx(40 / (7 + 2.58))
    assert resident_rate(MOE, 40e9) == pytest.approx(40 / (2 + 4))


def test_what_is_not_kept_is_read_from_the_disk() -> None:
    """2 GB/s in large pieces, half of that in experts; files of the second are half as large as in memory."""
    assert streamed_rate(DENSE, 40e9, DISK, 0) == pytest.approx(2 / 7)
    assert streamed_rate(DENSE, 40e9, DISK, 4 * GB) == pytest.approx(2 / 3)
    assert streamed_rate(DENSE, 40e9, DISK, 100 * GB) == pytest.approx(40 / 7)
    assert streamed_rate(MOE, 40e9, DISK, -1) == pytest.approx(1 / (1 / 2 + 16 / 8))
    assert streamed_rate(MOE, 40e9, DISK, 10 * GB) == pytest.approx(1 / (16 / 8 * (1 - 8 / 32)))
    assert streamed_rate(replace(DENSE, files=None), 40e9, DISK, 0) is None
    assert streamed_rate(DENSE, 40e9, replace(DISK, pieces=None), 0) is None


def test_without_a_bandwidth_there_are_no_rates() -> None:
    assert set(most_rates(DENSE, machine_with(bandwidth=None)).values()) == {None}
    assert set(most_rates(replace(DENSE, position_bytes=0), MACHINE).values()) == {None}


def test_a_model_that_fits_may_still_be_packed() -> None:
    """4e9 parameters in 18 bytes for 32; then 40 / (7 * 2.25 / 8) tokens a second."""
    assert fits(DENSE, MACHINE)
    (line,) = found(MACHINE, DENSE)
    assert line.startswith("advice: packed in Q4_0 the weights would take 2.2 GB, at most 20 tokens/s from there; ")
    assert line.endswith("python main.py quantize MODEL -o OUT")
    assert found(MACHINE, DENSE, folder=False) == []
    assert found(MACHINE, replace(DENSE, parameters=14 * GB)) == []


def test_a_model_that_does_not_fit_is_streamed_or_packed() -> None:
    small = machine_with(memory=Memory(8 * GB, 5 * GB, None))
    assert not fits(DENSE, small)
    room = 5 * GB - WORKSPACE - DENSE.cache_bytes(4096)
    expected = rate(2e9 / (7 * GB - room))
    problem, advice = found(small, DENSE)
    assert problem.startswith("problem: the weights, a cache of 4,096 tokens and working space take 8.6 GB, but 5.0 GB")
    assert f"--memory-budget 4.7GB keeps what fits and reads the rest from the disk, at most {expected}" in problem
    assert "2.2 GB and fit in memory" in advice
    text = "\n".join(model_lines(DENSE, small, "MODEL"))
    assert "the weights do not fit" in text
    assert f"at most 0.29 tokens/s with nothing kept in memory, {expected} with what fits" in text
    full = replace(DISK, free=2 * GB)
    assert "but only 2.0 GB are free on this disk" in found(replace(small, disk=full), DENSE)[1]


def test_a_context_whose_cache_does_not_fit_is_told_with_one_that_does() -> None:
    machine = machine_with(memory=Memory(16 * GB, 10 * GB, None))
    longest = longest_context(DENSE, machine)
    room = 10 * GB - WORKSPACE - 8 * GB
    assert DENSE.cache_bytes(longest) <= room < DENSE.cache_bytes(longest + 1)
    lines = found(machine, DENSE, folder=False)
    assert lines == [
        f"problem: the cache of 32,000 tokens takes 2.6 GB and does not fit beside the weights, that of {longest:,} "
        f"does; --max-length {longest}, or --cache-dtype int8 for smaller ones"
    ]


def test_an_accelerator_with_room_is_named() -> None:
    gpus = (Accelerator("cuda:0", "Small", 24 * GB, 4 * GB), Accelerator("cuda:1", "Large", 24 * GB, None))
    machine = machine_with(accelerators=gpus)
    assert found(machine, DENSE, folder=False) == ["advice: Large has room for it; --device cuda:1"]
    assert found(machine, MOE, folder=False)[-1].startswith("problem: the weights")
    assert "cuda:0 Small, 24.0 GB, 4.0 GB free, cuda:1 Large, 24.0 GB" in "\n".join(machine_lines(machine))


def test_experts_are_told_of() -> None:
    text = "\n".join(model_lines(MOE, MACHINE, "MODEL"))
    assert "reads 6.0 GB of weights, with 8 of 64 experts a layer" in text
    assert "with what fits and experts chosen evenly" in text


def test_figures_have_two_digits_at_least() -> None:
    assert [size(n) for n in (12, 6_180_000, 57e6, 999e6, 16.54e9)] == [
        "0.0 kB", "6.2 MB", "57 MB", "999 MB", "16.5 GB",
    ]  # fmt: skip
    assert [rate(n) for n in (0.0123, 0.58, 4.62, 71.2, 12_345.6)] == [
        "0.012 tokens/s", "0.58 tokens/s", "4.6 tokens/s", "71 tokens/s", "12,346 tokens/s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/job", {"sys/fs/cgroup/job/cpu.max": "max 100000"}, None),
        ("0::/job", {"sys/fs/cgroup/job/cpu.max": "250000 100000"}, 2.5),
        ("0::/", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        (
            "0::/a/b",
            {"sys/fs/cgroup/a/b/cpu.max": "400000 100000", "sys/fs/cgroup/a/cpu.max": "300000 100000"},
            3.0,
        ),
        (
            "3:cpu,cpuacct:/job",
            {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": 150000, "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": 100000},
            1.5,
        ),
        (
            "3:cpu:/job",
            {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": -1, "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": 100000},
            None,
        ),
    ],
)
def test_a_control_group_limits_processors(group: str, files: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    for name, content in {"proc/self/cgroup": group, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert processor_limit(tmp_path) == expected


def test_an_older_torch_knows_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    processor = read_processor()
    assert processor.features == ()
    assert processor.name


def test_features_are_those_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"cpu_name": "Cortex-X", "dot": True, "i8mm": False, "sve": True, "l2_cache_size": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    processor = read_processor()
    assert (processor.name, processor.features) == ("Cortex-X", ("dot product", "SVE"))


def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(number: int) -> tuple[int, int]:
        if number:
            raise RuntimeError("out of memory")
        return 3 * GB, 8 * GB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(name=f"G{number}", total_memory=8 * GB)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert accelerators() == [
        Accelerator("cuda:0", "G0", 8 * GB, 3 * GB),
        Accelerator("cuda:1", "G1", 8 * GB, None),
    ]


def test_apples_gpu_is_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 11 * GB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1 * GB)
    assert accelerators() == [Accelerator("mps", "Apple GPU", 11 * GB, 10 * GB)]


def test_a_package_may_come_in_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "mlflow-skinny":
            raise PackageNotFoundError(name)
        return "3.1"

    monkeypatch.setattr(causallm.doctor.software, "version", version)
    assert optional_packages() == {"prompt_toolkit": None, "matplotlib": None, "tensorboard": None, "mlflow": "3.1"}
    assert versions()["causallm"] is None
    lines = list(machine_lines(MACHINE))
    assert lines[0].startswith(f"versions      causallm (not installed), Python {sys.version.split()[0]}")
    assert "no tensorboard (training logs: extra tensorboard), mlflow 3.1" in lines[1]


@pytest.mark.parametrize(("available", "asked"), [(GB // 2, None), (GB, 250 * 10**6), (3 * GB, "usual")])
def test_little_memory_is_measured_with_less_of_it(available: int, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, sizes = causallm.doctor.machine, list[Any]()
    monkeypatch.setattr(machine, "available_memory", lambda: Memory(4 * GB, available, None))
    monkeypatch.setattr(machine, "read_bandwidth_apart", lambda _, size: sizes.append(size or "usual") or 1e9)
    monkeypatch.setattr(machine, "examine_disk", lambda _: DISK)
    examined = machine.examine(Path(), lambda _: None)
    assert sizes == ([] if asked is None else [asked])
    assert examined.bandwidth == (None if asked is None else 1e9)
    assert (examined.failure or "").startswith("too little memory" if asked is None else "")


def test_a_file_lies_on_its_folders_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causallm.doctor.machine, "disk_bandwidth", lambda *_: 5.0)
    monkeypatch.setattr(causallm.disk_bandwidth, "SMALLEST", 4)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    disk = examine_disk(tmp_path / "x.gguf")
    assert (disk.pieces, disk.experts, disk.failure) == (5.0, 5.0, None)
    assert 0 < disk.free <= disk.total
