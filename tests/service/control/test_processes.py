"""What the processes of a server take, read from a /proc that can be checked by hand, and from this machine's."""

import os
from collections.abc import Sequence
from pathlib import Path

from loraplex_service.control.processes import PAGE_BYTES, TICKS_PER_SECOND, ProcessFigures, processes

OWN = os.getpid()


def write(
    proc: Path,
    pid: int,
    children: Sequence[int] = (),
    pages: int = 0,
    ticks: int = 0,
    files: int = 0,
    command: str = "",
) -> None:
    (proc / str(pid) / "task" / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "fd").mkdir()
    for number in range(files):
        (proc / str(pid) / "fd" / str(number)).touch()
    (proc / str(pid) / "task" / str(pid) / "children").write_text(" ".join(map(str, children)))
    fields = ["S", *["0"] * 10, str(ticks), str(ticks), *["0"] * 8, str(pages), "0"]
    (proc / str(pid) / "stat").write_text(f"{pid} (python (a) b) {' '.join(fields)}")
    (proc / str(pid) / "cmdline").write_text(command)


def test_each_process_has_its_memory_its_time_and_its_files(tmp_path: Path) -> None:
    write(tmp_path, OWN, children=[7], pages=3, ticks=TICKS_PER_SECOND, files=2)
    write(tmp_path, 7, pages=5, files=1)
    assert processes({7: "llama"}, tmp_path) == [
        ProcessFigures(("service", ""), 3 * PAGE_BYTES, 2.0, 2),
        ProcessFigures(("engine", "llama"), 5 * PAGE_BYTES, 0.0, 1),
    ]


def test_what_an_engine_started_counts_as_that_engine_and_others_of_one_kind_together(tmp_path: Path) -> None:
    write(tmp_path, OWN, children=[7, 9, 10, 11])
    write(tmp_path, 7, children=[8], pages=1)
    write(tmp_path, 8, pages=2)
    write(tmp_path, 9, pages=4, command="python\0-m\0loraplex_service.http\x003")
    write(tmp_path, 10, pages=8)
    write(tmp_path, 11, pages=16)
    found = {each.labels: each.resident_bytes // PAGE_BYTES for each in processes({7: "llama"}, tmp_path)}
    assert found == {("service", ""): 0, ("engine", "llama"): 3, ("http", ""): 4, ("other", ""): 24}


def test_a_process_that_has_ended_meanwhile_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, OWN, children=[7])
    assert [each.labels for each in processes({7: "llama"}, tmp_path)] == [("service", "")]


def test_without_proc_there_are_no_figures(tmp_path: Path) -> None:
    assert processes({}, tmp_path) == []


def test_this_process_takes_something() -> None:
    own = processes({})[0]
    assert own.labels == ("service", "")
    assert own.resident_bytes > 1 << 20
    assert own.cpu_seconds > 0
    assert own.open_files > 0
