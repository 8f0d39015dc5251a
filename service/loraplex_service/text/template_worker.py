"""Renders chat templates in a process of its own: a script that chat_template.py starts, and that imports only jinja2.

Reads one JSON object per line, {"source": template, "variables": {...}}, and answers each with one line, {"text": ...}
or {"error": ...}. With "said": [names], the variables of these names are the caller's text, except for the roles of
messages, and the answer has "said": [[start, end], ...], the parts of the text that are theirs.

A template that hangs or grows without bound takes only this process with it: memory is limited by the kernel, and an
alarm ends it even when nobody is left to kill it.

The environment is that of transformers' apply_chat_template, which templates are written for.
"""

import importlib.util
import json
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_ERROR_CHARS = 1000  # a template writes its own messages, and they travel in gRPC headers


def _neighbour(name: str) -> ModuleType:
    """Load a module of this folder by its path: on sys.path the folder could hide other modules."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


said = _neighbour("said")


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: marks what the assistant said, for training. Here it is only a scope."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is. Jinja's own filter writes < and > as escapes, for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(literally: bool) -> jinja2.Environment:
    kind = said.FollowingEnvironment if literally else jinja2.sandbox.ImmutableSandboxedEnvironment
    environment: jinja2.Environment = kind(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    if isinstance(environment, said.FollowingEnvironment):
        environment.follow(_raise_exception)
    return environment


@lru_cache(maxsize=64)
def _compiled(source: str, literally: bool) -> jinja2.Template:
    return _environment(literally).from_string(source)


def render(source: str, variables: Mapping[str, Any], max_output_chars: int) -> str:
    """Render a template. Raises jinja2.TemplateError, and any error that the template raises."""
    return "".join(_parts(_compiled(source, literally=False), variables, max_output_chars))


def render_literally(
    source: str, variables: Mapping[str, Any], names: Sequence[str], max_output_chars: int
) -> tuple[str, list[tuple[int, int]]]:
    """Render as `render` does, and return which parts of the text come from the variables of these names."""
    variables = {"strftime_now": datetime.now().strftime, **variables}  # one time for both renderings
    marked = {name: said.marked(value) if name in names else value for name, value in variables.items()}
    for message, plain in zip(marked["messages"], variables["messages"], strict=True):
        message["role"] = plain["role"]  # the application's word: templates spell control tokens with it
    text = said.concat(_parts(_compiled(source, literally=True), marked, max_output_chars))
    if text != render(source, variables, max_output_chars):
        said.refuse("something of its own")
    return text, said.spans(text)


def _parts(template: jinja2.Template, variables: Mapping[str, Any], max_chars: int) -> Iterator[str]:
    length = 0
    for part in template.generate(variables):
        yield part
        length += len(part)
        if length > max_chars:
            raise jinja2.TemplateError(f"the rendered text is longer than {max_chars} characters")


class _ArgumentsError(Exception):
    """The arguments of a tool's call, or a tool's parameters, are no JSON object."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def _read_arguments(variables: Mapping[str, Any]) -> None:
    """Read the JSON that callers send as text: here, since they choose what it takes. Raises _ArgumentsError."""
    for number, message in enumerate(variables.get("messages", ())):
        for place, call in enumerate(message.get("tool_calls") or ()):
            _read_json(call, "arguments", f"messages[{number}].tool_calls[{place}]")
    for place, tool in enumerate(variables.get("tools") or ()):
        _read_json(tool, "parameters", f"tools[{place}]")


def _read_json(holder: Any, name: str, path: str) -> None:
    """Replace the text of a function's member by its value."""
    function = holder.get("function") if isinstance(holder, dict) else None
    if not isinstance(function, dict) or f"{name}_json" not in function:
        return
    field = f"{path}.{name}_json"
    try:
        value = json.loads(function.pop(f"{name}_json") or "{}")
    except (ValueError, RecursionError) as error:
        raise _ArgumentsError(field, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _ArgumentsError(field, "must be a JSON object")
    function[name] = value


def _answer(line: bytes, max_output_chars: int) -> dict[str, Any]:
    try:
        request = json.loads(line.decode(errors="surrogatepass"))
        variables = request["variables"]
        _read_arguments(variables)
        if "said" not in request:
            return {"text": render(request["source"], variables, max_output_chars)}
        text, spans = render_literally(request["source"], variables, request["said"], max_output_chars)
        return {"text": text, "said": spans}
    except _ArgumentsError as error:
        return {"field": error.field, "error": str(error)[:MAX_ERROR_CHARS]}
    except jinja2.TemplateSyntaxError as error:
        message = f"syntax error in line {error.lineno}: {error.message}"
    except jinja2.TemplateError as error:
        message = error.message or type(error).__name__
    except MemoryError:
        message = "the template needs more memory than it may have"
    except Exception as error:  # a template is a program: it can raise anything, and only its own request fails
        message = f"{type(error).__name__}: {error}"
    return {"error": message[:MAX_ERROR_CHARS]}


def main() -> None:
    deadline_seconds, max_output_chars, max_memory_bytes = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    _limit_memory(max_memory_bytes)
    _reply({"text": "ready"})
    for line in sys.stdin.buffer:
        # Of the processor: how busy the machine is, is not the template's fault. Ends the process by SIGPROF.
        signal.setitimer(signal.ITIMER_PROF, deadline_seconds)
        _reply(_answer(line, max_output_chars))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(max_bytes: int) -> None:
    """Limit the address space, for good; never above a limit that is there already."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _reply(answer: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
