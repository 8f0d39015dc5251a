"""A server whose models are named on the command line, and what is said where that cannot be."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from loraplex_service.cli import main
from loraplex_service.commands.serving import serves_model
from loraplex_service.config import ServiceConfig, load_config, make_config


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a model and an adapter, and the working directory."""
    (tmp_path / "Tiny-1.5B").mkdir()
    (tmp_path / "adapters" / "legal-v2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORAPLEX_CONFIG", raising=False)
    return tmp_path


def configured(*arguments: str) -> ServiceConfig:
    """What a server with these arguments would have."""
    given: dict[str, Any] = {}

    @click.command()
    @click.argument("model", required=False)
    @serves_model
    @click.option("--config")
    def command(**options: Any) -> None:
        given.update(options)

    command.main(list(arguments), standalone_mode=False)
    if given["fields"] is not None:
        return make_config(given["fields"], given["overrides"])
    return load_config(given["config"] and Path(given["config"]), given["overrides"])


def refused(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code != 0
    return result


def test_a_model_is_called_as_its_directory(directory: Path) -> None:
    [model] = configured("Tiny-1.5B").models
    assert (model.name, model.model) == ("tiny-1.5b", str(directory / "Tiny-1.5B"))


def test_a_model_of_the_hub_is_called_as_its_repository(directory: Path) -> None:
    [model] = configured("Owner/Some_Model-Instruct").models
    assert (model.name, model.model) == ("some_model-instruct", "Owner/Some_Model-Instruct")


@pytest.mark.parametrize(("file", "name"), [("Tiny.Q4_K_M.gguf", "tiny.q4_k_m"), ("a b.gguf", "a-b")])
def test_a_gguf_file_is_called_as_it_is_without_its_end(directory: Path, file: str, name: str) -> None:
    (directory / file).touch()
    assert configured(file).models[0].name == name


def test_the_working_directory_may_be_the_model(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory / "Tiny-1.5B")
    assert configured(".").models[0].name == "tiny-1.5b"


def test_a_model_has_what_is_said_of_it(directory: Path) -> None:
    options = ("--name", "small", "--device", "cpu", "--quantization", "int8", "--max-model-len", "512")
    config = configured("Tiny-1.5B", *options, "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0")
    [model] = config.models
    assert (model.name, model.device, model.quantization, model.max_model_len) == ("small", "cpu", "int8", 512)
    assert (config.listen, config.http_listen) == ("127.0.0.1:0", "127.0.0.1:0")


def test_adapters_are_of_the_model_and_may_be_read(directory: Path) -> None:
    config = configured("Tiny-1.5B", "--adapter", "legal=adapters/legal-v2", "--adapter", "far=hf://owner/far")
    assert [(each.name, each.model) for each in config.adapters] == [("legal", "tiny-1.5b"), ("far", "tiny-1.5b")]
    assert [each.source for each in config.adapters] == [str(directory / "adapters/legal-v2"), "hf://owner/far"]
    assert config.adapter_roots == (str(directory / "adapters"),)
    assert config.adapter_sources == ("hf://owner/",)


def test_where_it_listens_can_be_said_whatever_is_served(directory: Path) -> None:
    (directory / "loraplex.yaml").write_text("listen: 127.0.0.1:7\nmodels: [{name: tiny, model: Tiny-1.5B}]\n")
    for served in (("--config", "loraplex.yaml"), ()):
        config = configured(*served, "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:9")
        assert (config.listen, config.http_listen) == ("127.0.0.1:0", "127.0.0.1:9")


def test_nothing_is_kept_beside_the_working_directory(directory: Path) -> None:
    assert configured("Tiny-1.5B").state_directory == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--adapter", "a=b"], "--adapter goes with MODEL"),
        (["--device", "cpu"], "--device goes with MODEL"),
        (["Tiny-1.5B", "--config", "loraplex.yaml"], "not both"),
        (["Tiny-1.5B", "--adapter", "legal"], "--adapter 'legal': NAME=DIR is expected"),
        (["Tiny-1.5B", "--adapter", "legal=gone/legal"], "there is no directory"),
        (["Tiny-1.5B", "--adapter", "LEGAL=adapters/legal-v2"], "LEGAL"),
        (["Tiny-1.5B", "--name", "TINY"], "the name must be"),
        (["/gone"], "there is no directory /gone"),
        (["???"], "give --name"),
    ],
)
def test_what_cannot_be_served_is_said(directory: Path, arguments: list[str], problem: str) -> None:
    assert problem in refused(*arguments).output
