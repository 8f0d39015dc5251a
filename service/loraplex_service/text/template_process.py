"""A process that renders chat templates, one at a time: started at first use, replaced after it had to be killed."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_service.text.errors import RendererError, TemplateError

WORKER = Path(__file__).with_name("template_worker.py")
_START_SECONDS = 60.0  # to start an interpreter on a machine that is busy loading models
_END_SECONDS = 5.0  # to be gone, once its output is closed


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Limits on one rendering. Beyond a limit only its own request fails."""

    workers: int = 2  # processes, each for one rendering at a time
    seconds: float = 2.0  # of the processor
    stalled_seconds: float = 20.0  # of time: then it is the machine that is slow, and not the template
    source_chars: int = 1 << 20
    output_chars: int = 2 << 20
    memory_bytes: int = 1 << 30  # address space of a worker process


class _DiedError(Exception):
    """The process has ended: maybe earlier, while it was idle, and not because of this template."""


class TemplateProcess:
    """One worker process. For one event loop."""

    def __init__(self, limits: TemplateLimits) -> None:
        self.process: Process | None = None
        self._limits = limits
        self._closed = False

    async def render(self, line: bytes, is_long: bool) -> dict[str, Any]:
        """The answer to a request. `is_long`: read it in a thread. Raises TemplateError, RendererError."""
        try:
            answer = await self._ask(line)
        except _DiedError:
            try:
                answer = await self._ask(line)  # one more try tells
            except _DiedError as error:
                raise TemplateError("the chat template ended the process that renders it.") from error
        return await asyncio.to_thread(decode, answer) if is_long else decode(answer)

    def stop(self) -> None:
        """End the process for good. A rendering under way ends with RendererError."""
        self._closed = True
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

    async def close(self) -> None:
        """Wait until the process is gone. Call it only when no rendering is under way."""
        self.stop()
        await self._kill()

    async def _ask(self, line: bytes) -> bytes:
        """Send one request and wait for its answer. Whatever goes wrong, the process is not used again."""
        process = await self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._limits.stalled_seconds):
                process.stdin.write(line)
                await process.stdin.drain()
                return await process.stdout.readuntil(b"\n")
        except TimeoutError:
            await self._kill()
            raise RendererError(
                f"the process that renders chat templates did not answer for {self._limits.stalled_seconds:g} s."
            ) from None
        except (OSError, asyncio.IncompleteReadError) as error:
            await self._let_end(process)
            if process.returncode == -signal.SIGPROF:
                raise TemplateError(
                    f"the chat template was still rendering after {self._limits.seconds:g} s and was stopped. Shorten "
                    "the conversation, or correct the template."
                ) from None
            raise _DiedError from error
        except BaseException:
            await self._kill()
            raise

    async def _started(self) -> Process:
        self._check_open()
        if self.process is not None and self.process.returncode is None:
            return self.process
        limits = self._limits
        arguments = [str(limits.seconds), str(limits.output_chars), str(limits.memory_bytes)]
        # -I: neither this folder nor the environment decides what the worker imports. Nor does it see any secret in it.
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
        try:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                str(WORKER),
                *arguments,
                stdin=PIPE,
                stdout=PIPE,
                env=environment,
                limit=6 * limits.output_chars + 1024,  # a character is at most \\uXXXX in JSON, or 4 bytes
            )
            assert self.process.stdout is not None
            async with asyncio.timeout(_START_SECONDS):
                await self.process.stdout.readuntil(b"\n")
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            await self._kill()
            raise RendererError(
                f"the process that renders chat templates does not start ({sys.executable} with jinja2)."
            ) from error
        self._check_open()
        return self.process

    def _check_open(self) -> None:
        if self._closed:
            raise RendererError("chat templates are no longer rendered: the service is shutting down.")

    async def _let_end(self, process: Process) -> None:
        """Wait for a process that has closed its output. To kill it asks for its status first, and loses that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        await self._kill()

    async def _kill(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.communicate()


def encode(request: Mapping[str, Any]) -> bytes:
    """Encode a request as one line. Raises TemplateError for a value that is not JSON."""
    try:
        return json.dumps(request, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"the conversation is not JSON: {error}.") from error


def decode(line: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(line.decode(errors="surrogatepass"))
    return answer
