"""`loraplex demo`: one prompt through every model and every adapter at once, side by side in the terminal."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from loraplex import AsyncAdminClient, AsyncClient
from loraplex.v1.models_pb2 import MODEL_CAPABILITY_CHAT
from loraplex_service.app import Addresses
from loraplex_service.config import ServiceConfig

READY_SECONDS = 300.0  # for models larger than the embedded ones
PANEL_WIDTH = 44
PANEL_HEIGHT = 10
FRAMES_PER_SECOND = 20


@dataclass(slots=True)
class Answer:
    """The text that one model or adapter has generated so far."""

    target: str  # what the request names
    model: str  # the base model that runs
    title: str
    text: str = ""
    tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float | None = None  # once it has ended

    def status(self) -> str:
        if self.first_token_seconds is None:
            return "waiting"
        first = f"first after {1000 * self.first_token_seconds:.0f} ms"
        return first if self.seconds is None else f"{self.tokens} tokens in {self.seconds:.2f} s, {first}"

    def panel(self) -> Panel:
        return Panel(
            Text(self.text.strip()), title=self.title, subtitle=self.status(), width=PANEL_WIDTH, height=PANEL_HEIGHT
        )


class Show:
    """Shows all answers as they grow."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self._began = time.perf_counter()

    def __rich__(self) -> Group:
        return Group(Columns([answer.panel() for answer in self.answers]), Text(self.summary()))

    def summary(self) -> str:
        tokens = sum(answer.tokens for answer in self.answers)
        ended = [answer.seconds for answer in self.answers if answer.seconds is not None]
        seconds = max(ended) if len(ended) == len(self.answers) else time.perf_counter() - self._began
        return (
            f"{len(self.answers)} streams at once: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} a second"
        )


async def play_demo(
    addresses: Addresses, config: ServiceConfig, prompt: str, max_tokens: int, console: Console
) -> None:
    """Stream the prompt through everything that the configuration names. Raises LoraplexError."""
    async with AsyncClient(addresses.data) as client, AsyncAdminClient(addresses.admin) as admin:
        for model in config.models:
            await client.wait_until_serving(f"models/{model.name}", timeout=READY_SECONDS)
        models = await admin.list_models()
        chats = {model.name.removeprefix("models/"): MODEL_CAPABILITY_CHAT in model.capabilities for model in models}
        answers = all_answers(config)
        console.print(f"Prompt: {prompt}\n", markup=False, highlight=False)
        show = Show(answers)
        streams = asyncio.gather(
            *(_listen(client, answer, prompt, chats[answer.model], max_tokens) for answer in answers)
        )
        if console.is_terminal:
            with Live(show, console=console, refresh_per_second=FRAMES_PER_SECOND):
                await streams
            return
        await streams
        for answer in answers:
            heading = f"--- {answer.title}: {answer.status()}"
            console.print(f"{heading}\n{answer.text.strip()}\n", markup=False, highlight=False, soft_wrap=True)
        console.print(show.summary(), highlight=False)


def all_answers(config: ServiceConfig) -> list[Answer]:
    """An empty answer for each model and, after it, for each of its adapters."""
    answers = []
    for model in config.models:
        answers.append(Answer(f"models/{model.name}", model.name, f"{model.name} (base model)"))
        for adapter in config.adapters:
            if adapter.model == model.name:
                name = f"tenants/{adapter.tenant}/adapters/{adapter.adapter_id}"
                answers.append(Answer(name, model.name, f"{adapter.adapter_id} (adapter of {model.name})"))
    return answers


async def _listen(client: AsyncClient, answer: Answer, prompt: str, chat: bool, max_tokens: int) -> None:
    said = [{"role": "user", "content": prompt}] if chat else prompt
    began = time.perf_counter()
    stream = client.stream_generate(answer.target, said, max_tokens=max_tokens, temperature=0.0, token_ids=True)
    async for message in stream:
        if message.HasField("delta"):
            if answer.first_token_seconds is None:
                answer.first_token_seconds = time.perf_counter() - began
            answer.text += message.delta.text
            answer.tokens += len(message.delta.token_ids)
    answer.seconds = time.perf_counter() - began
