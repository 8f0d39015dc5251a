"""The key of the salts: kept with the state, the server's alone, and never a damaged one."""

from pathlib import Path

import pytest

from loraplex_service.admission.cache_key import cache_key


def test_a_key_outlives_the_server(tmp_path: Path) -> None:
    assert cache_key(tmp_path) == cache_key(tmp_path)
    assert (tmp_path / "cache.key").stat().st_mode & 0o777 == 0o600


def test_no_two_servers_have_the_same_key(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert len({cache_key(tmp_path), cache_key(tmp_path / "other"), cache_key(None), cache_key(None)}) == 4


@pytest.mark.parametrize("content", [b"", bytes(31), bytes(33)])
def test_a_damaged_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cache.key").write_bytes(content)
    with pytest.raises(OSError, match=r"cache.key is no key of 32 bytes: delete it"):
        cache_key(tmp_path)


def test_a_key_that_was_half_written_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "cache.unfinished").write_bytes(b"half")
    assert len(cache_key(tmp_path)) == 32
