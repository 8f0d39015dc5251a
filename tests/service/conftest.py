"""What the tests of the service share."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from loraplex_service.text import Tokenizer
from loraplex_service.text.token_decoders import BYTE_ALPHABET
from tests.service.control_plane import ControlPlane, control_plane
from tests.service.data_plane import DataPlane, data_plane

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token for each byte of UTF-8: the id is the byte. 256 begins a text, 257 ends it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(models.BPE({char: byte for char, byte in BYTE_ALPHABET.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def byte_tokenizer(byte_tokenizer_directory: Path) -> Tokenizer:
    return Tokenizer.load(byte_tokenizer_directory)


@pytest.fixture
async def plane(byte_tokenizer: Tokenizer) -> AsyncIterator[DataPlane]:
    async with data_plane(byte_tokenizer) as plane:
        yield plane


@pytest.fixture
async def control(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    """A service with the model "tiny" loaded and "other" not; adapters may lie in tmp_path."""
    async with control_plane(byte_tokenizer_directory, tmp_path) as control:
        yield control
