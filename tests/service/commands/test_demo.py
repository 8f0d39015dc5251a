"""The screen of `loraplex demo`."""

import pytest
from rich.console import Console

from loraplex_service.commands.demo import PANEL_WIDTH, Show, all_answers
from loraplex_service.config import load_config


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (60, 24)])
def test_all_voices_fit_a_terminal(width: int, height: int) -> None:
    answers = all_answers(load_config(None, {}), None)
    for answer in answers:
        answer.text = "word " * 200
    console = Console(width=width, height=height)
    with console.capture() as capture:
        console.print(Show(answers))
    lines = capture.get().splitlines()
    assert len(lines) <= max(height - 1, 5 * -(-len(answers) // ((width + 1) // (PANEL_WIDTH + 1))) + 1)
    assert max(map(len, lines)) <= width


def test_each_voice_is_asked_something_of_its_own_unless_all_are_asked_the_same() -> None:
    config = load_config(None, {})
    own, same = ({answer.prompt for answer in all_answers(config, prompt)} for prompt in (None, "Hello"))
    assert len(own) > 4
    assert same == {"Hello"}
