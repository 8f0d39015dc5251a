"""What the adapters of SmolLM2 were taught, and that they are small."""

import json
from pathlib import Path
from random import Random

import jinja2
import pytest

from loraplex_demo.real.lessons import FUNCTIONS, LESSONS, draw_tools

SERVED = Path(__file__).resolve().parents[2] / "demo/loraplex_demo/real/served"


def test_every_lesson_has_its_adapter_and_all_are_small() -> None:
    assert {path.name for path in (SERVED / "adapters").iterdir()} == LESSONS.keys()
    assert sum(path.stat().st_size for path in SERVED.rglob("*") if path.is_file()) < 2_000_000


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_is_a_question_and_an_answer_without_slots(lesson: str) -> None:
    rng = Random(3)
    for _ in range(300):
        *_, asked, answered = LESSONS[lesson](rng).turns
        assert (asked.role, answered.role) == ("user", "assistant")
        assert "{" not in asked.content


def test_an_order_is_taught_as_json_of_its_words() -> None:
    rng = Random(3)
    for _ in range(300):
        asked, answered = LESSONS["extract"](rng).turns
        order = json.loads(answered.content)
        assert order.keys() == {"name", "item", "count", "date", "price"}
        assert all(str(value) in asked.content for value in order.values())


def test_tools_are_taught_as_the_served_template_offers_them() -> None:
    template = jinja2.Template((SERVED / "chat_template.jinja").read_text())
    rng = Random(3)
    offers = [chat.turns for chat in (draw_tools(rng) for _ in range(200)) if chat.turns[0].role == "system"]
    assert offers
    for system, asked, _ in offers:
        names = [name for name in FUNCTIONS if name in system.content]
        names.sort(key=system.content.index)
        tools = [
            {"function": {"name": name, "parameters": {"properties": dict.fromkeys(FUNCTIONS[name][0])}}}
            for name in names
        ]
        rendered = template.render(tools=tools, messages=[{"role": "user", "content": asked.content}])
        assert rendered.startswith(f"<|im_start|>system\n{system.content}<|im_end|>\n<|im_start|>user\n")
