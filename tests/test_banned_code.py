"""What no file of the product may do: read pickles, run text as code, trust remote code, decide who may with assert."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("service", "engine", "adapters", "kernels", "client", "demo")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
METHODS = {  # by object and attribute
    "torch.load": "reads a pickle",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "yaml.unsafe_load": "runs code",
    "yaml.full_load": "runs code",
    "pandas.read_pickle": "reads a pickle",
}
ATTRIBUTES = {"recv_pyobj", "send_pyobj"}  # of ZeroMQ sockets: pickles
ARGUMENTS = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}
YAML_LOADERS = {"SafeLoader", "CSafeLoader", "_StrictLoader"}
# Here an assert would be a door that `python -O` takes out of its hinges.
NO_ASSERTS = (
    "service/loraplex_service/auth",
    "service/loraplex_service/names/grammar.py",
    "service/loraplex_service/ports/tls.py",
    "service/loraplex_service/requests/sampling.py",
    "service/loraplex_service/admission/admission.py",
    "service/loraplex_service/admission/tenants.py",
    "service/loraplex_service/validation",
)


def banned(tree: ast.AST, room: str) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (f"import {name.name}" for name in names if name.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                yield f"from {module}"
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield f"{name}()"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr="load"), keywords=keywords):
                loaders = [word.value for word in keywords if word.arg == "Loader"]
                if not (
                    loaders and isinstance(loaders[0], ast.Name | ast.Attribute) and _name(loaders[0]) in YAML_LOADERS
                ):
                    yield "yaml.load without a safe loader"
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if f"{owner}.{attribute}" in METHODS:
                yield f"{owner}.{attribute}: {METHODS[f'{owner}.{attribute}']}"
            case ast.Attribute(attr=attribute) if attribute in ATTRIBUTES:
                yield f".{attribute}"
            case ast.keyword(arg=str(name), value=ast.Constant(value=value)) if name in ARGUMENTS:
                if value is ARGUMENTS[name]:
                    yield f"{name}={value}"
            case ast.Assert() if room.startswith(NO_ASSERTS):
                yield "assert"


def _name(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_banned_is_used(path: Path) -> None:
    room = str(path.relative_to(ROOT))
    assert list(banned(ast.parse(path.read_text()), room)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import dill as d",
        "from pickle import loads",
        "from marshal import *",
        "eval(text)",
        "exec(text)",
        "__import__('os')",
        "torch.load(file)",
        "load = torch.load",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "socket.recv_pyobj()",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "numpy.load(file, allow_pickle=True)",
        "os.system(line)",
        "assert allowed",
    ],
)
def test_the_ban_finds_what_it_bans(code: str) -> None:
    assert list(banned(ast.parse(code), "service/loraplex_service/auth/door.py"))
