"""Requests of an adapter read and write text as the files beside its weights say."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from loraplex import Unavailable
from loraplex.v1.adapters_pb2 import Adapter
from loraplex_adapters.files.source import text_digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.versions import AdapterSpec, AdapterVersion
from loraplex_service.adapters.texts import AdapterTexts
from loraplex_service.text import Tokenizer
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.scripted_engine import ScriptedCore
from tests.waits import MOST_SECONDS

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
THINK = 258


def write_text(directory: Path, token_id: int = THINK, template: str | None = TEMPLATE) -> Path:
    config = {"added_tokens_decoder": {str(token_id): {"content": "<think>"}}, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def _with_padded_vocabulary(core: ScriptedCore) -> None:
    core.limits = msgspec.structs.replace(core.limits, vocab_size=300)


@pytest.fixture
async def padded(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(byte_tokenizer_directory, tmp_path, _with_padded_vocabulary) as control:
        yield control


async def create(control: ControlPlane, directory: Path, name: str = "mine") -> Adapter:
    return await control.admin.create_adapter(name, base_model="tiny", source=str(directory), wait=MOST_SECONDS)


async def test_its_own_tokens_are_read_and_written(padded: ControlPlane, tmp_path: Path) -> None:
    adapter = await create(padded, write_text(write_adapter(tmp_path / "mine")))
    assert list(adapter.warnings) == ["a warning"]
    tokens = await padded.client.tokenize("mine", "a<think>")
    assert list(tokens.token_ids) == [97, THINK]
    assert len((await padded.client.tokenize("tiny", "a<think>")).token_ids) == 8
    assert (await padded.client.detokenize("mine", [97, THINK])).text == "a<think>"
    assert (await padded.client.generate("mine", "a<think>", max_tokens=4)).outputs[0].text == "a<think>a<think>"


async def test_its_own_tokens_can_end_a_generation(padded: ControlPlane, tmp_path: Path) -> None:
    await create(padded, write_text(write_adapter(tmp_path / "mine")))
    answer = await padded.client.generate("mine", "ab<think>c", max_tokens=4, stop=["<think>"])
    assert answer.outputs[0].text == "ab"


async def test_its_own_template_is_rendered_and_the_base_s_for_the_base(padded: ControlPlane, tmp_path: Path) -> None:
    await create(padded, write_text(write_adapter(tmp_path / "mine")))
    messages = [{"role": "user", "content": "hi"}]
    own = await padded.client.tokenize("mine", messages, include_text=True)
    assert own.text == "[hi]"
    assert (await padded.client.tokenize("tiny", messages, include_text=True)).text != "[hi]"


async def test_an_uploaded_text_comes_along_and_makes_another_version(padded: ControlPlane, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "mine")
    first = await padded.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=MOST_SECONDS)
    write_text(files)
    second = await padded.admin.upload_adapter("mine", base_model="tiny", directory=files, wait=MOST_SECONDS)
    assert first.version != second.version
    assert list((await padded.client.tokenize("mine", "<think>")).token_ids) == [THINK]


async def test_a_text_that_cannot_be_read_is_warned_of_without_a_path(padded: ControlPlane, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "mine")
    (directory / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    warning = list((await create(padded, directory)).warnings)[-1]
    assert "its own text is not used: tokenizer.json: is a Git LFS pointer" in warning
    assert str(tmp_path) not in warning
    assert (await padded.client.generate("mine", "ab", max_tokens=1)).outputs[0].text == "a"


async def test_validating_alone_warns_of_the_text_too(padded: ControlPlane, tmp_path: Path) -> None:
    directory = write_text(write_adapter(tmp_path / "mine"), token_id=97)
    adapter = await padded.admin.create_adapter("mine", base_model="tiny", source=str(directory), validate_only=True)
    assert "'<think>': not added" in list(adapter.warnings)[-1]


async def test_trained_tokens_that_no_tokenizer_has_are_warned_of(padded: ControlPlane, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "mine")
    config = json.loads((directory / "adapter_config.json").read_text()) | {"trainable_token_indices": [97, THINK]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    warning = list((await create(padded, directory)).warnings)[-1]
    assert warning == f"tokens {THINK} were trained, and no tokenizer has them: keep tokenizer.json beside the weights"
    write_text(directory)
    assert list((await create(padded, directory)).warnings) == ["a warning"]


async def test_a_text_that_was_changed_on_disk_is_not_read(padded: ControlPlane, tmp_path: Path) -> None:
    directory = write_text(write_adapter(tmp_path / "mine"))
    await create(padded, directory)
    padded.app.entrance._adapter_texts._held.clear()
    write_text(directory, template="of somebody else")
    with pytest.raises(Unavailable, match="they were changed"):
        await padded.client.tokenize("mine", "a")


@pytest.fixture
def version_of(tmp_path: Path) -> Callable[..., AdapterVersion]:
    registry = AdapterRegistry()

    def make(number: int, template: str) -> AdapterVersion:
        directory = write_text(write_adapter(tmp_path / f"a{number}"), template=template)
        version = registry.register("shared", f"a{number}", f"{number:064x}", AdapterSpec("tiny", ""))
        return replace(version, directory=str(directory), text_digest=text_digest(directory))

    return make


async def test_texts_are_kept_up_to_a_size(
    byte_tokenizer: Tokenizer, version_of: Callable[..., AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_service.adapters.texts.MAX_HELD_CHARS", 250)
    texts = AdapterTexts(lambda version: version.directory)
    versions = [version_of(number, "x" * 100) for number in range(3)]
    for version in (versions[0], versions[1], versions[0], versions[2]):
        await texts.text(version, byte_tokenizer)
    held: list[AdapterKey] = list(texts._held)
    assert held == [versions[0].key, versions[2].key]


async def test_another_life_of_the_model_has_its_own_tokenizer(
    byte_tokenizer: Tokenizer, byte_tokenizer_directory: Path, version_of: Callable[..., AdapterVersion]
) -> None:
    texts = AdapterTexts(lambda version: version.directory)
    version, other = version_of(0, TEMPLATE), Tokenizer.load(byte_tokenizer_directory)
    first, again = await texts.text(version, byte_tokenizer), await texts.text(version, byte_tokenizer)
    assert first is again
    assert await texts.text(version, other) is not first
