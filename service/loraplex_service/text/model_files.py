"""The small JSON and Jinja files around a tokenizer, read once and interpreted in this file alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from loraplex_adapters.files.gguf import GGUFError
from loraplex_service.text.errors import TokenizerError
from loraplex_service.text.gguf_tokenizer import read_metadata, read_text

# A JSON file larger than this is not a configuration. Tokenizers themselves are read by their own library.
MAX_CONFIG_BYTES = 64 << 20
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class ModelFiles:
    """The content of a Hugging Face model directory, or of a GGUF file, about text, besides the vocabulary."""

    directory: Path  # or the file
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    added_tokens: Mapping[int, AddedToken]  # by id; from tokenizer_config.json, else added_tokens.json
    model_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    chat_templates: Mapping[str, str]  # by name; "default" where there is only one
    gguf: Mapping[str, object] | None = None  # the metadata of a GGUF file

    @classmethod
    def read(cls, directory: Path) -> "ModelFiles":
        """Read the files of a model directory, or a GGUF file.

        Raises TokenizerError for a file that exists and cannot be read.
        """
        if directory.is_file():
            return cls._read_gguf(directory)
        tokenizer_config = _json_object(directory / "tokenizer_config.json")
        # Once the configuration lists the added tokens itself, the two older files no longer count (as transformers).
        outdated = "added_tokens_decoder" in tokenizer_config
        special_tokens_map = {} if outdated else _json_object(directory / "special_tokens_map.json")
        return cls(
            directory=directory,
            tokenizer_config=tokenizer_config,
            special_tokens_map=special_tokens_map,
            added_tokens=_added_tokens(directory, tokenizer_config, special_tokens_map),
            model_config=_json_object(directory / "config.json"),
            generation_config=_json_object(directory / "generation_config.json"),
            chat_templates=_chat_templates(directory, tokenizer_config),
        )

    @classmethod
    def _read_gguf(cls, path: Path) -> "ModelFiles":
        metadata = read_metadata(path)
        try:
            config, generation, templates = read_text(metadata)
        except (GGUFError, TokenizerError) as error:
            raise TokenizerError(f"{path}: {error}") from error
        return cls(path, config, {}, {}, {}, generation, templates, metadata)

    @classmethod
    def read_beside_adapter(cls, directory: Path) -> "ModelFiles":
        """Read only the files that the digest of an adapter covers. Raises TokenizerError."""
        config = _json_object(directory / "tokenizer_config.json")
        special_tokens_map = (
            {} if "added_tokens_decoder" in config else _json_object(directory / "special_tokens_map.json")
        )
        template = directory / "chat_template.jinja"
        return cls(
            directory,
            config,
            special_tokens_map,
            _added_tokens(directory, config, special_tokens_map),
            model_config={},
            generation_config={},
            chat_templates={"default": _read_text(template)} if template.is_file() else _declared(directory, config),
        )

    @property
    def tokenizer_class(self) -> str | None:
        """The declared tokenizer class without "Fast": both spellings name one tokenizer."""
        name = self.tokenizer_config.get("tokenizer_class") or self.model_config.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) else None

    @property
    def model_type(self) -> str | None:
        name = self.model_config.get("model_type")
        return name if isinstance(name, str) else None

    def special_token(self, name: str, default: str | None) -> str | None:
        """The text of bos_token or eos_token; `default` where no file mentions it, None where one says null."""
        if name in self.tokenizer_config or name in self.special_tokens_map:
            return self.named_special_tokens().get(name)
        return default

    def named_special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, pad_token and whatever else is named, with their text."""
        return _named_special_tokens(self.tokenizer_config, self.special_tokens_map)

    def other_special_tokens(self) -> list[str]:
        """Special tokens that have no name of their own."""
        return _other_special_tokens(self.tokenizer_config, self.special_tokens_map)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """The ids that `name` (eos_token_id, bos_token_id) has for generation: one, several or none.

        generation_config.json counts before config.json, whose text part counts where the model has several.
        """
        text_config = self.model_config.get("text_config")
        for config in (self.generation_config, self.model_config, text_config):
            ids = config.get(name) if isinstance(config, Mapping) else None
            if ids is None:
                continue
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
                raise TokenizerError(
                    f"{self.directory}: {name} is {ids}. It must be a token id or a list of them; correct "
                    "generation_config.json or config.json."
                )
            return tuple(ids)
        return ()


def read_file(path: Path) -> bytes:
    """The file's bytes. Raises TokenizerError if it cannot be read or is a Git LFS pointer."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    if data.startswith(LFS_POINTER):
        raise TokenizerError(f"{path}: is a Git LFS pointer, not the file. Run `git lfs pull` in {path.parent}.")
    return data


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start}).") from error


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise TokenizerError(f"{path}: {path.stat().st_size} bytes is too large for a configuration file.")
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"{path}: is not valid JSON ({error}). Fetch the file again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a {type(value).__name__}; a JSON object is expected.")
    return value


def _content(token: Any) -> str | None:
    """The text of a token written as a string or as an AddedToken object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) and content else None


def _named_special_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    named: dict[str, str] = {}
    for config in configs:
        extra = config.get("extra_special_tokens")
        tokens = {**(extra if isinstance(extra, Mapping) else {}), **config}
        for name, token in tokens.items():
            content = _content(token)
            if name.endswith("_token") and content is not None:
                named[name] = content
    return named


def _other_special_tokens(*configs: Mapping[str, Any]) -> list[str]:
    tokens: dict[str, None] = {}
    for config in configs:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = config.get(key)
            if isinstance(listed, list):
                tokens.update((content, None) for token in listed if (content := _content(token)) is not None)
    return list(tokens)


def _added_tokens(
    directory: Path, config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]
) -> dict[int, AddedToken]:
    if "added_tokens_decoder" in config:
        path = directory / "tokenizer_config.json"
        try:
            tokens = {int(token_id): _added_token(token) for token_id, token in config["added_tokens_decoder"].items()}
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise TokenizerError(f"{path}: added_tokens_decoder is malformed ({error!r}).") from error
        return dict(sorted(tokens.items()))
    path = directory / "added_tokens.json"
    listed = _json_object(path)
    if not all(type(token_id) is int for token_id in listed.values()):
        raise TokenizerError(f"{path}: must give each token its id, as a number.")
    special = {
        *_named_special_tokens(config, special_tokens_map).values(),
        *_other_special_tokens(config, special_tokens_map),
    }
    return {
        token_id: AddedToken(token, special=token in special, normalized=token not in special)
        for token, token_id in sorted(listed.items(), key=lambda item: item[1])
    }


def _added_token(spec: Any) -> AddedToken:
    if isinstance(spec, str):
        return AddedToken(spec, special=True, normalized=False)
    flags = {
        key: bool(spec[key]) for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in spec
    }
    return AddedToken(spec["content"], **flags)


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files of their own replace those of tokenizer_config.json, all of them (as transformers)."""
    templates: dict[str, str] = {}
    if (path := directory / "chat_template.jinja").is_file():
        templates["default"] = _read_text(path)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    return templates or _declared(directory, config)


def _declared(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of tokenizer_config.json, by name."""
    declared = config.get("chat_template")
    if declared is None:
        return {}
    if isinstance(declared, str):
        return {"default": declared}
    try:
        templates = {entry["name"]: entry["template"] for entry in declared}
    except (TypeError, KeyError) as error:
        raise TokenizerError(
            f"{directory / 'tokenizer_config.json'}: chat_template must be a string, or a list of objects with `name` "
            "and `template`."
        ) from error
    return templates
