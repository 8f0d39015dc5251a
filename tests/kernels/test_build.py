"""kernels/build.py: what a compilation leaves behind."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BUILD = Path(__file__).resolve().parents[2] / "kernels/build.py"


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", BUILD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("status", "left"), [(0, ["libloraplex_portable.so"]), (1, [])])
def test_a_compilation_leaves_a_whole_library_or_nothing(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, left: list[str]
) -> None:
    """A compiler that fails may have written a part of its output."""
    compiler, folder = tmp_path / "compiler", tmp_path / "libraries"
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\necho part > "$last"\nexit {status}\n')
    compiler.chmod(0o755)
    folder.mkdir()
    monkeypatch.setenv("CXX", str(compiler))
    made = build.compiled(folder, [], ["portable"])
    assert [path.name for path in folder.iterdir()] == [path.name for path in made] == left
