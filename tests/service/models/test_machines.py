"""What a configuration may say of a model over several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraplex_service.config import load_config
from loraplex_service.config_file import ConfigError
from loraplex_service.models.machines import meeting_options
from tests.e2e.conftest import DEMO

OVER_TWO = {"tensor_parallel": 2, "machines": 2}
LISTEN = "machines_listen: 127.0.0.1:50055"
SECRET = "machines_secret: secret"


def load(directory: Path, *lines: str, models: tuple[dict[str, Any], ...] = (OVER_TWO,)) -> Any:
    (directory / "secret").write_text("0123456789abcdef" * 2)
    file = directory / "loraplex.yaml"
    named = [
        {"name": f"model-{number}", "model": str(DEMO / "models" / "quizzer")} | model
        for number, model in enumerate(models)
    ]
    file.write_text("\n".join([*lines, f"models: {named}"]))
    return load_config(file, {})


def test_the_engine_is_told_where_the_other_machines_come(tmp_path: Path) -> None:
    config = load(tmp_path, LISTEN, SECRET)
    options = ("--machines-listen", "127.0.0.1:50055", "--machines-secret", str(tmp_path / "secret"))
    assert meeting_options(config.models[0], config.machines_listen, config.machines_secret) == options


def test_the_engine_of_a_model_on_one_machine_is_not(tmp_path: Path) -> None:
    config = load(tmp_path, LISTEN, SECRET, models=(OVER_TWO, {}))
    assert meeting_options(config.models[1], config.machines_listen, config.machines_secret) == ()


@pytest.mark.parametrize(
    ("lines", "models", "problem"),
    [
        ([], (OVER_TWO,), "'model-0' is over several machines: set machines_listen and machines_secret"),
        ([LISTEN], (OVER_TWO,), "'model-0' is over several machines: set machines_listen and machines_secret"),
        ([LISTEN, SECRET], ({},), "machines_listen: no model has machines above 1"),
        ([LISTEN, SECRET], (OVER_TWO, OVER_TWO), "'model-0' and 'model-1' have machines above 1, as one may"),
        ([LISTEN, "machines_secret: none"], (OVER_TWO,), "none cannot be read: No such file"),
        (["machines_listen: nowhere", SECRET], (OVER_TWO,), "address 'nowhere' of the first machine: HOST:PORT"),
        (["machines_listen: 10.0.0.5:1", SECRET], (OVER_TWO,), "is neither encrypted nor authenticated"),
        ([LISTEN, SECRET], (OVER_TWO | {"machines": 3},), "machines 3: 2 ranks cannot be shared out equally"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, lines: list[str], models: tuple[dict[str, Any], ...], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(tmp_path, *lines, models=models)


def test_an_address_that_others_reach_needs_a_network_that_is_trusted(tmp_path: Path) -> None:
    assert load(tmp_path, "machines_listen: 10.0.0.5:50055", SECRET, "insecure: true").machines_listen
