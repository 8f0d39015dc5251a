"""The server's own copies of adapter files."""

from pathlib import Path

from loraplex_adapters.files.depot import Depot


def gathered(depot: Depot) -> Path:
    incoming = depot.begin()
    (incoming / "adapter_config.json").write_text("{}")
    return incoming


def test_what_an_earlier_process_left_is_swept_but_for_what_is_kept(tmp_path: Path) -> None:
    earlier = Depot(tmp_path)
    unfinished = gathered(earlier)
    kept, forgotten = (earlier.admit(gathered(earlier), digest) for digest in ("aa", "bb"))
    Depot(tmp_path).sweep({"aa"})
    assert not unfinished.exists()
    assert kept.exists()
    assert not forgotten.exists()


def test_nothing_whole_is_swept_while_it_is_not_known_what_is_kept(tmp_path: Path) -> None:
    earlier = Depot(tmp_path)
    whole, unfinished = earlier.admit(gathered(earlier), "aa"), gathered(earlier)
    Depot(tmp_path).sweep(None)
    assert whole.exists()
    assert not unfinished.exists()


def test_what_has_begun_since_the_start_is_not_swept(tmp_path: Path) -> None:
    depot = Depot(tmp_path)
    coming, admitted = gathered(depot), depot.admit(gathered(depot), "aa")
    depot.sweep(set())
    assert coming.exists()
    assert admitted.exists()
