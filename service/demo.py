"""`loraplex demo`: one prompt through every model and every adapter at once, side by side in the terminal."""

import asyncio
import time
from dataclasses import dataclass, field

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from loraplex import AsyncClient
from service.app import Addresses
from service.config import ServiceConfig

READY_SECONDS = 120.0
PANEL_WIDTH = 44
FRAMES_PER_SECOND = 20


@dataclass(slots=True)
class Answer:
    """What one model or adapter has said so far."""

    target: str  # what the request names
    title: str
    text: str = ""
    tokens: int = 0
    seconds: float | None = None  # once it has ended
    first_token_seconds: float | None = None

    def status(self) -> str:
        if self.first_token_seconds is None:
            return "waiting"
        first = f"first token {1000 * self.first_token_seconds:.0f} ms"
        if self.seconds is None:
            return first
        return f"{self.tokens} tokens in {self.seconds:.2f} s, {first}"


@dataclass(slots=True)
class Show:
    """All answers, on a terminal or on paper."""

    answers: list[Answer]
    began: float = field(default_factory=time.perf_counter)

    def __rich__(self) -> RenderableType:
        panels = [
            Panel(Text(answer.text.strip()), title=answer.title, subtitle=answer.status(), width=PANEL_WIDTH, height=12)
            for answer in self.answers
        ]
        return Group(Columns(panels), Text(self.summary()))

    def summary(self) -> str:
        tokens = sum(answer.tokens for answer in self.answers)
        seconds = time.perf_counter() - self.began
        return f"{len(self.answers)} streams at once, {tokens} tokens, {tokens / max(seconds, 1e-9):.0f} tokens/s"


async def play_demo(
    addresses: Addresses, config: ServiceConfig, prompt: str, max_tokens: int, console: Console
) -> None:
    """Stream the prompt through everything that the configuration names. Raises LoraplexError."""
    answers = [Answer(f"models/{model.name}", f"{model.name} (base model)") for model in config.models]
    for adapter in config.adapters:
        name = f"tenants/{adapter.tenant}/adapters/{adapter.adapter_id}"
        answers.append(Answer(name, f"{adapter.adapter_id} (adapter of {adapter.model})"))
    answers.sort(key=lambda answer: [model.name in answer.title for model in config.models], reverse=True)
    async with AsyncClient(addresses.data) as client:
        for model in config.models:
            await client.wait_until_serving(f"models/{model.name}", timeout=READY_SECONDS)
        console.print(Text(f"Prompt: {prompt}\n", style="bold"))
        show = Show(answers)
        streams = asyncio.gather(*(_listen(client, answer, prompt, max_tokens) for answer in answers))
        if console.is_terminal:
            with Live(show, console=console, refresh_per_second=FRAMES_PER_SECOND):
                await streams
        else:
            await streams
            for answer in answers:
                console.print(f"--- {answer.title}: {answer.status()}\n{answer.text.strip()}\n", markup=False)
            console.print(show.summary())


async def _listen(client: AsyncClient, answer: Answer, prompt: str, max_tokens: int) -> None:
    began = time.perf_counter()
    stream = client.stream_generate(answer.target, prompt, max_tokens=max_tokens, temperature=0.0, token_ids=True)
    async for message in stream:
        if message.HasField("delta"):
            if answer.first_token_seconds is None:
                answer.first_token_seconds = time.perf_counter() - began
            answer.text += message.delta.text
            answer.tokens += len(message.delta.token_ids)
    answer.seconds = time.perf_counter() - began
