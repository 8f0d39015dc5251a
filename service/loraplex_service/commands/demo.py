"""`loraplex demo`: every model and every adapter answers at once, side by side in the terminal."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from loraplex import AsyncAdminClient, AsyncClient
from loraplex.v1.models_pb2 import MODEL_CAPABILITY_CHAT
from loraplex_service.app import Addresses
from loraplex_service.commands.shared import visible
from loraplex_service.config import ServiceConfig

READY_SECONDS = 300.0  # for models larger than the embedded ones
PANEL_WIDTH = 26  # three side by side in 80 columns
PANEL_HEIGHTS = range(5, 11)
BORDER = 2  # lines of a panel that hold no text, and columns on each side
BESIDE_PANELS = 2  # lines below them
DEFAULT_PROMPT = "Tell me a story about a fox."
# What each voice of the demo's models answers well.
QUESTIONS = {
    "quizzer": "What is 17 + 25?",
    "json": "What is the capital of France?",
    "pirate": "What colour is the sky?",
    "formal": "Hello, who are you?",
    "shouting": "Tell me a story about a cat.",
    "extract": "Maria Lopez ordered 12 lamps on 4 May and paid 60 euros.",
    "tools": "What is the weather in Oslo?",
}
FRAMES_PER_SECOND = 20


@dataclass(slots=True)
class Answer:
    """The text that one model or adapter has generated so far."""

    target: str  # what the request names
    model: str  # the base model that runs
    title: str
    prompt: str
    text: str = ""
    tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float | None = None  # once it has ended

    def status(self) -> str:
        if self.first_token_seconds is None:
            return "waiting"
        first = f"first after {1000 * self.first_token_seconds:.0f} ms"
        return first if self.seconds is None else f"{self.tokens} tokens in {self.seconds:.2f} s, {first}"

    def panel(self, console: Console, height: int) -> Panel:
        """The question, and the last lines of the answer that there is room for."""
        question = Text(f"> {self.prompt}", style="dim", no_wrap=True, overflow="ellipsis")
        lines = Text(self.text.strip()).wrap(console, PANEL_WIDTH - 2 * BORDER)[-(height - BORDER - 1) :]
        done = "" if self.seconds is None else f"{self.tokens} tokens, {self.seconds:.1f} s"
        return Panel(Group(question, *lines), title=self.title, subtitle=done, width=PANEL_WIDTH, height=height)


class Show:
    """Shows all answers as they grow."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self._began = time.perf_counter()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        rows = -(-len(self.answers) // max(1, (options.max_width + 1) // (PANEL_WIDTH + 1)))
        room = (console.height - BESIDE_PANELS) // rows
        height = min(max(room, PANEL_HEIGHTS.start), PANEL_HEIGHTS.stop - 1)
        yield Columns([answer.panel(console, height) for answer in self.answers], padding=(0, 1))
        yield Text(self.summary())

    def summary(self) -> str:
        tokens = sum(answer.tokens for answer in self.answers)
        ended = [answer.seconds for answer in self.answers if answer.seconds is not None]
        seconds = max(ended) if len(ended) == len(self.answers) else time.perf_counter() - self._began
        return (
            f"{len(self.answers)} streams at once: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} a second"
        )


async def play_demo(
    addresses: Addresses, config: ServiceConfig, prompt: str | None, max_tokens: int, console: Console
) -> None:
    """Ask everything that the configuration names, with the prompt or each with its own. Raises LoraplexError."""
    async with AsyncClient(addresses.data) as client, AsyncAdminClient(addresses.admin) as admin:
        for model in config.models:
            await client.wait_until_serving(f"models/{model.name}", timeout=READY_SECONDS)
        models = await admin.list_models()
        chats = {model.name.removeprefix("models/"): MODEL_CAPABILITY_CHAT in model.capabilities for model in models}
        answers = all_answers(config, prompt)
        show = Show(answers)
        streams = asyncio.gather(*(_listen(client, answer, chats[answer.model], max_tokens) for answer in answers))
        if console.is_terminal:
            with Live(show, console=console, refresh_per_second=FRAMES_PER_SECOND):
                await streams
            return
        await streams
        for answer in answers:
            heading = f"--- {answer.title}, asked: {answer.prompt} {answer.status()}"
            console.print(f"{heading}\n{answer.text.strip()}\n", markup=False, highlight=False, soft_wrap=True)
        console.print(show.summary(), highlight=False)


def all_answers(config: ServiceConfig, prompt: str | None) -> list[Answer]:
    """An empty answer for each model and, after it, for each of its adapters."""

    def asked(name: str) -> str:
        return prompt if prompt is not None else QUESTIONS.get(name, DEFAULT_PROMPT)

    answers = []
    for model in config.models:
        answers.append(Answer(f"models/{model.name}", model.name, model.name, asked(model.name)))
        for adapter in config.adapters:
            if adapter.model == model.name:
                name = f"tenants/{adapter.tenant}/adapters/{adapter.adapter_id}"
                title = f"{model.name}+{adapter.adapter_id}"
                answers.append(Answer(name, model.name, title, asked(adapter.adapter_id)))
    return answers


def next_steps(program: str, config: ServiceConfig, file: Path | None) -> str:
    """Commands to try next, with what was served. `file`: the configuration; None: the embedded one."""
    models = [model.name for model in config.models]
    names = [adapter.adapter_id for adapter in config.adapters] or models
    return (
        "\nNext, with a server that stays:\n"
        f"  {program} serve{'' if file is None else f' --config {file}'}\n"
        "and beside it:\n"
        f"  {program} chat {names[0]}\n"
        f"  {program} bench {models[0]} {names[0]} --streams 8"
    )


async def _listen(client: AsyncClient, answer: Answer, chat: bool, max_tokens: int) -> None:
    said = [{"role": "user", "content": answer.prompt}] if chat else answer.prompt
    began = time.perf_counter()
    stream = client.stream_generate(answer.target, said, max_tokens=max_tokens, temperature=0.0, token_ids=True)
    async for message in stream:
        if message.HasField("delta"):
            if answer.first_token_seconds is None:
                answer.first_token_seconds = time.perf_counter() - began
            answer.text += visible(message.delta.text)
            answer.tokens += len(message.delta.token_ids)
    answer.seconds = time.perf_counter() - began
