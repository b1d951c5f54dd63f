"""Which limit counts, on fake roots with the files that Linux's control groups have, in both versions."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from causallm.available_memory import Memory, available_memory

GB = 10**9
UNLIMITED = 0x7FFFFFFFFFFFF000


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GB, of which 10 can be taken."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GB, available=10 * GB))


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def unified(folder: str, limit: object, used: int, cached: int = 0) -> dict[str, object]:
    """The files of a group of version 2; half of the file pages active."""
    stat = f"anon 7\nactive_file {cached // 2}\ninactive_file {cached - cached // 2}\nslab 9"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def legacy(folder: str, limit: int, used: int, cached: int = 0) -> dict[str, object]:
    stat = f"cache 1\ninactive_file 1\ntotal_active_file 0\ntotal_inactive_file {cached}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": stat,
    }


def test_without_control_groups_the_machine_counts(tmp_path) -> None:
    assert available_memory(tmp_path) == Memory(16 * GB, 10 * GB, None)


def test_a_group_of_version_2(tmp_path) -> None:
    """3 GB used, of which 1 GB are file pages."""
    group = unified("sys/fs/cgroup/user.slice/job", 4 * GB, 3 * GB, 1 * GB)
    root = write(tmp_path, {"proc/self/cgroup": "0::/user.slice/job", **group})
    assert available_memory(root) == Memory(16 * GB, 2 * GB, 4 * GB)


def test_a_group_above_holds_as_well(tmp_path) -> None:
    files = {
        **unified("sys/fs/cgroup/user.slice/job", "max", 1 * GB),
        **unified("sys/fs/cgroup/user.slice", 6 * GB, 5 * GB),
    }
    root = write(tmp_path, {"proc/self/cgroup": "0::/user.slice/job", **files})
    assert available_memory(root) == Memory(16 * GB, 1 * GB, 6 * GB)


def test_the_tightest_limit_need_not_be_the_fullest(tmp_path) -> None:
    files = {
        **unified("sys/fs/cgroup/a/b", 4 * GB, 0),
        **unified("sys/fs/cgroup/a", 6 * GB, 5 * GB),
    }
    assert available_memory(write(tmp_path, {"proc/self/cgroup": "0::/a/b", **files})) == (16 * GB, 1 * GB, 4 * GB)


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/../../job"])
def test_a_container_sees_its_group_as_the_topmost(path, tmp_path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": f"0::{path}", **unified("sys/fs/cgroup", 2 * GB, GB // 2)})
    assert available_memory(root) == Memory(16 * GB, 3 * GB // 2, 2 * GB)


def test_a_group_of_version_1(tmp_path) -> None:
    lines = "9:name=systemd:/\n5:cpu,memory:/job\n3:cpuset:/\n0::/"
    group = legacy("sys/fs/cgroup/memory/job", 3 * GB, 2 * GB, 1 * GB)
    root = write(tmp_path, {"proc/self/cgroup": lines, **group, **legacy("sys/fs/cgroup/memory", UNLIMITED, 14 * GB)})
    assert available_memory(root) == Memory(16 * GB, 2 * GB, 3 * GB)


def test_no_limit_is_none(tmp_path) -> None:
    group = legacy("sys/fs/cgroup/memory/job", UNLIMITED, 15 * GB)
    root = write(tmp_path, {"proc/self/cgroup": "4:memory:/job\n0::/", **group})
    assert available_memory(root) == Memory(16 * GB, 10 * GB, None)


def test_a_limit_that_is_used_up_leaves_nothing(tmp_path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/job", **unified("sys/fs/cgroup/job", GB, GB + 1)})
    assert available_memory(root) == Memory(16 * GB, 0, GB)


def test_a_wide_limit_leaves_what_the_machine_has(tmp_path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/job", **unified("sys/fs/cgroup/job", 15 * GB, 0)})
    assert available_memory(root) == Memory(16 * GB, 10 * GB, 15 * GB)


def test_this_machine_has_memory(monkeypatch) -> None:
    monkeypatch.undo()
    memory = available_memory()
    assert 0 <= memory.available <= memory.total == psutil.virtual_memory().total
    assert memory.limit is None or memory.available <= memory.limit < memory.total
