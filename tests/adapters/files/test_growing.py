"""A file that is read while it is written."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.growing import GrowingFile, Growth
from loraplex_adapters.files.safetensors import read_header


def test_a_read_waits_for_its_bytes_and_for_no_others(tmp_path: Path) -> None:
    path, growth, about_to_read = tmp_path / "file", Growth(10), threading.Event()
    path.write_bytes(b"0123")
    growth.reach(4)
    with path.open("rb") as opened, ThreadPoolExecutor(1) as thread:
        file = GrowingFile(opened, growth)
        assert file.read(3) == b"012"

        def read() -> bytes:
            about_to_read.set()
            return file.read(3)

        reading = thread.submit(read)
        about_to_read.wait()
        assert not reading.done()
        with path.open("ab") as more:
            more.write(b"45")
        growth.reach(6)
        assert reading.result() == b"345"


def test_the_end_is_where_it_will_be(tmp_path: Path) -> None:
    path, growth = tmp_path / "file", Growth(6)
    path.write_bytes(b"012345")
    with path.open("rb") as opened:
        file = GrowingFile(opened, growth)
        assert file.seek(0, 2) == 6
        growth.reach(6)
        assert (file.seek(4), file.read(), file.read(1)) == (4, b"45", b"")
        buffer = bytearray(4)
        file.seek(4)
        assert (file.readinto(buffer), bytes(buffer[:2])) == (2, b"45")


def test_whoever_waits_hears_that_no_more_comes(tmp_path: Path) -> None:
    path, growth = tmp_path / "file", Growth(10)
    path.write_bytes(b"0123")
    growth.reach(4)
    with path.open("rb") as opened, ThreadPoolExecutor(1) as thread:
        reading = thread.submit(GrowingFile(opened, growth).read, 5)
        growth.end()
        with pytest.raises(AdapterRejected, match="after 4 of 10 bytes"):
            reading.result()


def test_a_header_is_read_before_the_data_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    growth = Growth(path.stat().st_size + 8)
    growth.reach(path.stat().st_size)
    with path.open("rb") as opened:
        assert read_header(GrowingFile(opened, growth)).data_bytes == 8
