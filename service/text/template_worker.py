"""Renders chat templates in a process of its own: a script that chat_template.py starts, and that imports only jinja2.

Reads one JSON object per line, {"source": template, "variables": {...}}, and answers each with one line, {"text": ...}
or {"error": ...}. A template that hangs or grows without bound takes only this process with it: memory is limited by
the kernel, and an alarm ends it even when nobody is left to kill it.

The environment is that of transformers' apply_chat_template, which templates are written for.
"""

import json
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_ERROR_CHARS = 1000  # a template writes its own messages, and they travel in gRPC headers


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


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def render(source: str, variables: Mapping[str, Any], max_output_chars: int) -> str:
    """The text that a template makes of its variables. Raises jinja2.TemplateError, and whatever else it raises."""
    parts: list[str] = []
    length = 0
    for part in _compiled(source).generate(variables):
        parts.append(part)
        length += len(part)
        if length > max_output_chars:
            raise jinja2.TemplateError(f"the rendered text is longer than {max_output_chars} characters")
    return "".join(parts)


class _ArgumentsError(Exception):
    """The arguments of a tool's call are no JSON object."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def _read_arguments(messages: Sequence[Mapping[str, Any]]) -> None:
    """Read the JSON that callers send as text: here, since they choose what it takes. Raises _ArgumentsError."""
    for number, message in enumerate(messages):
        for place, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or "arguments_json" not in function:
                continue
            field = f"messages[{number}].tool_calls[{place}].arguments_json"
            try:
                arguments = json.loads(function.pop("arguments_json") or "{}")
            except (ValueError, RecursionError) as error:
                raise _ArgumentsError(field, f"is not JSON: {error}") from error
            if not isinstance(arguments, dict):
                raise _ArgumentsError(field, "must be a JSON object")
            function["arguments"] = arguments


def _answer(line: bytes, max_output_chars: int) -> dict[str, str]:
    try:
        request = json.loads(line.decode(errors="surrogatepass"))
        variables = request["variables"]
        _read_arguments(variables.get("messages", ()))
        return {"text": render(request["source"], variables, max_output_chars)}
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


def _reply(answer: Mapping[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
