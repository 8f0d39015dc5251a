"""Writes the parts of the client that follow from others, so that they cannot differ from them.

    python client/generate.py          write them
    python client/generate.py check    fail if a file is not what would be written

What can be called is said once, in loraplex/operations and in the options that it takes. From there come the methods of
async_client.py and specs.py, with every option spelled out, so that help(), editors and type checkers show it.
blocking.py and client.py are awaiting.py and async_client.py without `await`.
"""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent / "loraplex"
SOURCES = (
    "channel",
    "generation",
    "operations/adapters",
    "operations/inference",
    "operations/models",
    "operations/pooled",
    "operations/routes",
    "operations/server",
)
WIDTH = 120
HEADER = "Written by client/generate.py from {}: change that, not this."
IMPORTS = """
import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from google.protobuf.empty_pb2 import Empty

from loraplex import generation
from loraplex.awaiting import AsyncCaller, AsyncGenerateStream, AsyncStream
from loraplex.channel import Timeout
from loraplex.operations import adapters, inference, models, pooled, routes, server
from loraplex.operations.adapters import Residency
from loraplex.prompts import PromptLike, Tool
from loraplex.v1 import (
    adapters_pb2,
    generation_pb2,
    inference_pb2,
    models_pb2,
    pooling_pb2,
    prompt_pb2,
    routes_pb2,
    server_pb2,
    tokenizer_pb2,
)
from loraplex.watermark import Watermark

"""


@dataclass(frozen=True)
class ClientClass:
    """A class of async_client.py, and the operations that are its methods."""

    name: str
    base: str
    doc: str
    operations: dict[str, tuple[str, ...]]


CLASSES = (
    ClientClass(
        "_AsyncReader",
        "AsyncCaller",
        "Calls that both ports answer: which models, adapters and routes there are, and what the server takes.",
        {
            "models": ("get_model", "list_models"),
            "adapters": ("get_adapter", "list_adapters"),
            "routes": ("get_route", "list_routes", "resolve_target"),
            "server": ("get_server_info",),
        },
    ),
    ClientClass(
        "AsyncClient",
        "_AsyncReader",
        "The data port: generates, embeds, classifies, looks around. Made, used and closed in one event loop.",
        {
            "inference": (
                "generate",
                "stream_generate",
                "batch_generate",
                "score",
                "cancel_generation",
                "tokenize",
                "detokenize",
            ),
            "pooled": ("embed", "classify", "rerank"),
        },
    ),
    ClientClass(
        "AsyncAdminClient",
        "_AsyncReader",
        "The admin port: models, adapters, routes and the server itself. Made, used and closed in one event loop.",
        {
            "models": ("load_model", "unload_model", "watch_models"),
            "adapters": (
                "create_adapter",
                "upload_adapter",
                "update_adapter",
                "delete_adapter",
                "load_adapter",
                "unload_adapter",
                "watch_adapters",
            ),
            "routes": ("update_route", "delete_route"),
            "server": ("watch_load", "watch_usage"),
        },
    ),
)

# By what kind of operation it is: what the method returns, and how it gets there.
KINDS = {
    "Operation": ("async def", "{}", "await self._run"),
    "Upload": ("async def", "{}", "await self._upload"),
    "Listing": ("async def", "list[{}]", "await self._list"),
    "StreamOperation": ("def", "AsyncStream[{}]", "self._stream"),
    "GenerationOperation": ("def", "AsyncGenerateStream", "self._stream_generation"),
}

# From a file that awaits to one that blocks, in code and prose.
BLOCKING = (
    (r"\bAwaits answers", "Waits for answers"),
    (r"\basynchronous clients\b", "blocking clients"),
    (r"\bblocking\.py is this file without `await`; .*", HEADER.format("awaiting.py")),
    (r"\bfrom the event loop's thread\b", "from any thread"),
    (r"\bIt is made, used and closed in one running event loop\.", "It may be shared between threads."),
    (r" Raises RuntimeError where no event loop is running\.", ""),
    (r"\bMade, used and closed in one event loop\.", "May be shared between threads."),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\banext\b", "next"),
    (r"__a(iter|next|enter|exit)__", r"__\1__"),
    (r"\bStopAsyncIteration\b", "StopIteration"),
    (r"\bAsyncGenerator\[str, None\]", "Generator[str, None, None]"),
    (r"\bopen_async\b", "open"),
    (r"\b(_?)Async(\w+)", r"\1\2"),
    (r"\bawaiting\b(?!\.py)", "blocking"),
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as it is written."""

    name: str
    annotation: str
    default: str | None = None
    doc: str = ""  # empty: what the function's own documentation says

    def __str__(self) -> str:
        return f"{self.name}: {self.annotation}" + ("" if self.default is None else f" = {self.default}")


class Sources:
    """Definitions in the hand-written files: functions, groups of options, and defaults of options."""

    def __init__(self) -> None:
        self.functions: dict[str, ast.FunctionDef] = {}
        self.groups: dict[str, ast.ClassDef] = {}
        self.defaults: dict[str, str] = {}
        for source in SOURCES:
            for node in ast.parse((PACKAGE / f"{source}.py").read_text()).body:
                match node:
                    case ast.FunctionDef(name=name):
                        self.functions[name] = node
                    case ast.ClassDef(name=name):
                        self.groups[name] = node
                    case ast.AnnAssign(target=ast.Name(id="CALL_DEFAULTS"), value=ast.Dict() as values):
                        self.defaults = {option: repr(value) for option, value in ast.literal_eval(values).items()}

    def options(self, group: str) -> Iterator[Parameter]:
        """Find the options of a group: those of the groups that it consists of, then its own."""
        node = self.groups[group]
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.groups:
                yield from self.options(base.id)
        for field, doc in zip(node.body, [*node.body[1:], None], strict=True):
            match field, doc:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    default = self.defaults.get(name, "None")
                    yield Parameter(name, ast.unparse(field.annotation), default, inspect.cleandoc(text))
                case ast.AnnAssign(), _:
                    raise ValueError(f"{group}.{ast.unparse(field.target)} has no line of documentation below it")

    def parameters(self, function: ast.FunctionDef) -> tuple[list[Parameter], list[Parameter]]:
        """Find what may be given by position, and what by name alone: its own parameters, then options."""
        given = function.args
        assert given.vararg is None
        assert not given.posonlyargs
        first = len(given.args) - len(given.defaults)
        positional = [
            Parameter(arg.arg, _annotation(arg), ast.unparse(given.defaults[index - first]) if index >= first else None)
            for index, arg in enumerate(given.args)
        ]
        named = [
            Parameter(arg.arg, _annotation(arg), None if default is None else ast.unparse(default))
            for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        ]
        match given.kwarg:
            case ast.arg(annotation=ast.Subscript(slice=ast.Name(id=group))):
                named += self.options(group)
        return positional, named


def _annotation(arg: ast.arg) -> str:
    assert arg.annotation is not None
    return ast.unparse(arg.annotation)


def documentation(function: ast.FunctionDef, parameters: list[Parameter]) -> str:
    """Join the function's own documentation and a line for each option."""
    doc = ast.get_docstring(function) or ""
    lines = [line for p in parameters if p.doc for line in _filled(f"{p.name}: {p.doc}")]
    if lines and "\nArgs:\n" not in doc:
        doc += "\n\nArgs:"
    return "\n".join([doc, *lines]) + ("\n" if "\n" in doc else "")


def _filled(line: str) -> list[str]:
    width = WIDTH - 8  # the indentation of a method's documentation
    return textwrap.wrap(line, width, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)


def definition(
    sources: Sources, function: ast.FunctionDef, *, head: str, own: list[str], returns: str, body: str
) -> str:
    """Write a function with every option spelled out, which passes them all on."""
    positional, named = sources.parameters(function)
    signature = [*own, *map(str, positional), *(["*", *map(str, named)] if named else [])]
    passed = [*(p.name for p in positional), *(f"{p.name}={p.name}" for p in named)]
    doc = textwrap.indent(f'"""{documentation(function, positional + named)}"""', "    ")
    call = body.format(", ".join(passed))
    return f"{head}({', '.join(signature)},) -> {returns}:\n{doc}\n    return {call}\n"


def method(sources: Sources, module: str, name: str) -> str:
    """Write a method of an asynchronous client, from the operation that it runs."""
    function = sources.functions[name]
    match function.returns:
        case ast.Subscript(value=ast.Name(id=kind), slice=answer):
            answers = ast.unparse(answer)
        case ast.Name(id=kind):
            answers = ""
        case _:
            raise ValueError(f"the return type of {name} must be an operation of operations/base.py")
    keyword, returns, runner = KINDS[kind]
    text = definition(
        sources,
        function,
        head=f"{keyword} {name}",
        own=["self"],
        returns=returns.format(answers),
        body=f"{runner}({module}.{name}({{}}))",
    )
    return textwrap.indent(text, "    ")


def async_client(sources: Sources) -> str:
    text = f'"""The asynchronous clients: what to call on which port.\n\n{HEADER.format("operations/")}\n"""\n{IMPORTS}'
    for kind in CLASSES:
        text += f'class {kind.name}({kind.base}):\n    """{kind.doc}"""\n\n'
        text += "\n".join(method(sources, module, name) for module, names in kind.operations.items() for name in names)
    return text


def specs(sources: Sources) -> str:
    text = f'"""GenerateSpec with every option spelled out.\n\n{HEADER.format("generation.py")}\n"""\n{IMPORTS}'
    return text + definition(
        sources,
        sources.functions["build_spec"],
        head="def generate_spec",
        own=[],
        returns="generation_pb2.GenerateSpec",
        body="generation.build_spec({})",
    )


def blocking(awaiting: str) -> str:
    for pattern, replacement in BLOCKING:
        awaiting = re.sub(pattern, replacement, awaiting)
    if left := re.search(r".*(\basync\b|\bawait\b|Async|asyncio).*", awaiting):
        raise ValueError(f"BLOCKING does not say how this becomes blocking: {left[0].strip()}")
    return awaiting


def tidy(text: str) -> str:
    """Remove imports that are not used, sort the others, and format everything."""
    for command in (["check", "--quiet", "--fix", "--select", "F401,I"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(PACKAGE / "generated.py"), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def files() -> dict[Path, str]:
    """Say what each generated file shall hold."""
    sources = Sources()
    methods = async_client(sources)
    texts = {
        "specs.py": specs(sources),
        "async_client.py": methods,
        "client.py": blocking(methods),
        "blocking.py": blocking((PACKAGE / "awaiting.py").read_text()),
    }
    return {PACKAGE / name: tidy(text) for name, text in texts.items()}


def main(command: str = "write") -> None:
    outdated = {file: text for file, text in files().items() if not file.exists() or file.read_text() != text}
    if command == "check" and outdated:
        sys.exit(f"Out of date: {', '.join(file.name for file in outdated)}. Run: make stubs")
    for file, text in outdated.items():
        file.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
