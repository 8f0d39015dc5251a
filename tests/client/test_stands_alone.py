"""The client without the rest of the repository."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import loraplex

PACKAGE = Path(loraplex.__file__).parent
ALLOWED = ("grpc", "loraplex", "google.protobuf", "google.rpc", "google.api", "typing_extensions")


def imported() -> Iterator[str]:
    """Every module that the client imports from, stubs for type checkers included."""
    for file in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]:
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names=names):
                    yield from (name.name for name in names)
                case ast.ImportFrom(module=str(module), names=names, level=0):
                    yield from (f"{module}.{name.name}" for name in names)


def test_it_imports_grpc_protobuf_the_common_protos_and_the_standard_library() -> None:
    others = {name for name in imported() if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in others if not f"{name}.".startswith(tuple(f"{allowed}." for allowed in ALLOWED))} == set()


def test_it_needs_no_file_outside_its_folder(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "loraplex", ignore=shutil.ignore_patterns("__pycache__"))
    program = "import loraplex; print(loraplex.__file__, loraplex.generate_spec('demo', 'Once').model)"
    environment = {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert result.stdout.split() == [str(tmp_path / "loraplex" / "__init__.py"), "demo"]
