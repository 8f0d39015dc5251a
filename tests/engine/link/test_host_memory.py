"""The host's memory is the machine's, within the limits of the control groups around the process."""

from pathlib import Path

import pytest

from loraplex_engine.link.host_memory import free_bytes, total_bytes

MEMINFO = "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 600 kB\n"
KIB = 1024


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in ({"proc/meminfo": MEMINFO} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n"})
    assert (total_bytes(root), free_bytes(root)) == (1000 * KIB, 600 * KIB)


def test_a_containers_limit_counts_and_pages_of_files_that_may_go_are_free(tmp_path: Path) -> None:
    group = {"memory.max": "409600\n", "memory.current": "204800\n", "memory.stat": "anon 1\ninactive_file 102400\n"}
    files = {f"sys/fs/cgroup/{name}": text for name, text in group.items()}
    root = write(tmp_path, files | {"proc/self/cgroup": "0::/\n"})
    assert (total_bytes(root), free_bytes(root)) == (400 * KIB, 300 * KIB)


def test_files_that_were_read_twice_do_not_keep_a_model_from_being_loaded_again(tmp_path: Path) -> None:
    group = {
        "memory.max": "409600",
        "memory.current": "307200",
        "memory.stat": "inactive_file 51200\nactive_file 153600",
    }
    files = {f"sys/fs/cgroup/{name}": text for name, text in group.items()}
    assert free_bytes(write(tmp_path, files | {"proc/self/cgroup": "0::/\n"})) == 300 * KIB


def test_the_least_limit_of_all_groups_around_the_process_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/slice/unit\n",
        "sys/fs/cgroup/slice/memory.max": "204800",
        "sys/fs/cgroup/slice/memory.current": "102400",
        "sys/fs/cgroup/slice/unit/memory.max": "max",
    }
    assert (total_bytes(write(tmp_path, files)), free_bytes(tmp_path)) == (200 * KIB, 100 * KIB)


def test_a_limit_of_the_first_version_of_control_groups_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/pod\n1:cpu:/\n0::/\n",
        "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": "307200",
        "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": "204800",
        "sys/fs/cgroup/memory/pod/memory.stat": "total_inactive_file 51200",
    }
    assert (total_bytes(write(tmp_path, files)), free_bytes(tmp_path)) == (300 * KIB, 150 * KIB)


@pytest.mark.parametrize("used", ["409600", "819200"])
def test_what_is_used_beyond_the_limit_leaves_nothing(tmp_path: Path, used: str) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "409600",
        "sys/fs/cgroup/memory.current": used,
    }
    assert free_bytes(write(tmp_path, files)) == 0


def test_this_machine_has_some() -> None:
    assert 0 < free_bytes() <= total_bytes()
