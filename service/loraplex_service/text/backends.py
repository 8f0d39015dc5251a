"""Builds a `tokenizers.Tokenizer` from the files of a model directory, in any of their three forms."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from loraplex_adapters.files.gguf import GGUFError
from loraplex_service.text.errors import TokenizerError
from loraplex_service.text.gguf_tokenizer import read_vocabulary
from loraplex_service.text.model_files import ModelFiles, read_file
from loraplex_service.text.sentencepiece_model import read_sentencepiece
from loraplex_service.text.token_decoders import METASPACE

_TEKKEN = "tekken.json"


class Backend(NamedTuple):
    """A tokenizer, and the special tokens that its own file names where no configuration does."""

    tokenizer: tokenizers.Tokenizer
    bos_token: str | None = None
    eos_token: str | None = None


def load_backend(files: ModelFiles) -> Backend:
    """The tokenizer of a GGUF file, or of a directory: tokenizer.json, else vocab.json + merges.txt, else
    tokenizer.model.

    With tokenizer.json, that file alone says whether a text gets BOS and EOS; with the others, `add_bos_token` and
    `add_eos_token` of tokenizer_config.json do (as transformers 5). Raises TokenizerError.
    """
    directory = files.directory
    if files.gguf is not None:
        backend = _from_gguf(files.directory, files.gguf)
        _add_bos_and_eos(backend, files)
        _mark_special_tokens(backend.tokenizer, files)
        return backend
    if not directory.is_dir():
        raise TokenizerError(f"{directory}: is no directory. Give the directory that holds the model's files.")
    if (path := directory / "tokenizer.json").is_file():
        backend = _read(path, _from_json)
        _add_tokens(backend.tokenizer, files)
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        backend = _byte_level_bpe(files)
        _add_tokens(backend.tokenizer, files)
        _add_bos_and_eos(backend, files)
    elif (path := directory / "tokenizer.model").is_file():
        backend = _read(path, lambda data: Backend(*read_sentencepiece(data)))
        _add_tokens(backend.tokenizer, files)
        _add_bos_and_eos(backend, files)
    else:
        if (directory / _TEKKEN).is_file():
            raise TokenizerError(
                f"{directory / _TEKKEN}: is in Mistral's own format, which is not read. Put the tokenizer.json of the "
                "same model there: its repository in Hugging Face layout has one."
            )
        found = sorted(entry.name for entry in directory.iterdir() if "token" in entry.name or "vocab" in entry.name)
        raise TokenizerError(
            f"{directory}: holds no tokenizer (found: {', '.join(found) or 'none of its files'}). Put tokenizer.json "
            "there, or vocab.json with merges.txt, or tokenizer.model."
        )
    _mark_special_tokens(backend.tokenizer, files)
    _use_prefix_space(backend.tokenizer, files)
    _use_llama_spacing(backend.tokenizer, files)
    backend.tokenizer.encode_special_tokens = bool(files.tokenizer_config.get("split_special_tokens", False))
    return backend


def _from_gguf(path: Path, metadata: Mapping[str, object]) -> Backend:
    try:
        return Backend(read_vocabulary(metadata))
    except (GGUFError, TokenizerError) as error:
        raise TokenizerError(f"{path}: {error}") from error
    except Exception as error:  # the library raises bare Exception for every malformed vocabulary
        raise TokenizerError(f"{path}: its vocabulary cannot be read ({error}). Fetch the file again.") from error


def _from_json(data: bytes) -> Backend:
    tokenizer = tokenizers.Tokenizer.from_buffer(data)
    tokenizer.no_truncation()  # limits that training left in the file are none of serving's
    tokenizer.no_padding()
    return Backend(tokenizer)


def _read(path: Path, read: Callable[[bytes], Backend]) -> Backend:
    data = read_file(path)
    try:
        return read(data)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise TokenizerError(f"{path}: cannot be read as a tokenizer ({error}). Fetch the file again.") from error


# ---- vocab.json + merges.txt ---------------------------------------------------------------------------------------

# How Qwen2 cuts a text before its merges; the files do not say it, the class does.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDOFTEXT = "<|endoftext|>"  # special to all these classes, named in no file
_BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "CodeGenTokenizer", "Qwen2Tokenizer")
_CLASS_OF_MODEL_TYPE = {
    "gpt2": "GPT2Tokenizer",
    "gptj": "GPT2Tokenizer",
    "gpt_neo": "GPT2Tokenizer",
    "codegen": "CodeGenTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}


def _byte_level_bpe(files: ModelFiles) -> Backend:
    """Byte-level BPE in the form from before tokenizer.json. How text is cut first depends on the tokenizer class."""
    name = files.tokenizer_class or _CLASS_OF_MODEL_TYPE.get(files.model_type or "")
    if name not in _BYTE_LEVEL_CLASSES:
        raise TokenizerError(
            f"{files.directory}: vocab.json and merges.txt do not say how {name or 'an unnamed tokenizer class'} cuts "
            f"text into words; known are {', '.join(_BYTE_LEVEL_CLASSES)}. Put tokenizer.json there: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory) writes it."
        )
    vocab, merges = files.directory / "vocab.json", files.directory / "merges.txt"
    for path in (vocab, merges):
        read_file(path)  # for its message: the library's does not name the file
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
        raise TokenizerError(f"{vocab}, {merges}: cannot be read as byte-level BPE ({error}).") from error
    is_qwen2 = name == "Qwen2Tokenizer"
    if is_qwen2:
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_known(backend, [_ENDOFTEXT]))
    return Backend(backend, bos_token=None if is_qwen2 else _ENDOFTEXT, eos_token=_ENDOFTEXT)


# ---- what the other files add --------------------------------------------------------------------------------------


def _known(backend: tokenizers.Tokenizer, tokens: list[str]) -> list[str]:
    return [token for token in tokens if backend.token_to_id(token) is not None]


def _add_tokens(backend: tokenizers.Tokenizer, files: ModelFiles) -> None:
    """Add the tokens that only the configuration lists. Each must get the id that it is given there."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in files.added_tokens.items():
        if token.content not in known:
            backend.add_tokens([token])
            actual = backend.token_to_id(token.content)
            if actual != token_id:
                raise TokenizerError(
                    f"{files.directory}: the configuration gives the added token {token.content!r} the id {token_id}, "
                    f"but the vocabulary leads to {actual}. The files belong to different tokenizers; fetch them again."
                )


def _mark_special_tokens(backend: tokenizers.Tokenizer, files: ModelFiles) -> None:
    """Mark the named special tokens of the vocabulary as special.

    A token that the vocabulary lacks is left out: transformers would give it an id beyond the model's embeddings.
    """
    flags = {token.content: token for token in files.added_tokens.values()}
    for content in _known(backend, [*files.named_special_tokens().values(), *files.other_special_tokens()]):
        backend.add_special_tokens([flags.get(content) or AddedToken(content, special=True, normalized=False)])


def _add_bos_and_eos(backend: Backend, files: ModelFiles) -> None:
    """Put BOS before and EOS after every text, if the configuration asks for it."""
    template, special = ["$A"], []
    for flag, token, position in (
        ("add_bos_token", files.special_token("bos_token", backend.bos_token), 0),
        ("add_eos_token", files.special_token("eos_token", backend.eos_token), 2),
    ):
        if not files.tokenizer_config.get(flag) or token is None:
            continue
        token_id = backend.tokenizer.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"{files.directory}: {flag} is set, but {token!r} is not in the vocabulary.")
        template.insert(position, token)
        special.append((token, token_id))
    if special:
        template_processing = processors.TemplateProcessing(single=template, pair=None, special_tokens=special)
        backend.tokenizer.post_processor = template_processing


_OLDEST_SPACING = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": METASPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE},
    ],
}


def _use_prefix_space(backend: tokenizers.Tokenizer, files: ModelFiles) -> None:
    """The byte-level classes take from tokenizer_config.json whether a text gets a space before it (absent: no),
    whatever tokenizer.json says, as transformers 5 does: but for Mistral's models, which have a class of their own."""
    if files.tokenizer_class not in (*_BYTE_LEVEL_CLASSES, "GPTNeoXTokenizer") or files.model_type == "mistral":
        return
    rule = backend.pre_tokenizer
    # The library's types do not say that a sequence can be iterated.
    steps: list[Any] = list(cast(Any, rule)) if isinstance(rule, pre_tokenizers.Sequence) else [rule]
    for step in steps:
        if isinstance(step, pre_tokenizers.ByteLevel):
            step.add_prefix_space = bool(files.tokenizer_config.get("add_prefix_space"))


def _use_llama_spacing(backend: tokenizers.Tokenizer, files: ModelFiles) -> None:
    """Llama tokenizers put ▁ before a text that has none, in "legacy" form also behind every special token.

    tokenizer_config.json says which of the two holds (absent: not legacy), or that neither does (add_prefix_space),
    whatever rule tokenizer.json keeps, as transformers 5 reads it. Only Llama's own class has these switches; a model
    type that merely borrows the class (phi3, mistral) goes by its tokenizer.json.
    """
    if files.tokenizer_class != "LlamaTokenizer" or files.model_type not in (None, "llama"):
        return
    if not _marks_spaces(backend):
        return
    has_prefix = files.tokenizer_config.get("add_prefix_space")
    if has_prefix is not None and not has_prefix:
        scheme = "never"
        backend.decoder = decoders.Sequence(
            [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]  # strips no space that was put
        )
    else:
        scheme = "always" if files.tokenizer_config.get("legacy") else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(METASPACE, prepend_scheme=scheme, split=False)


def _marks_spaces(backend: tokenizers.Tokenizer) -> bool:
    """Whether spaces become ▁ and one is put before a text, in either of two spellings."""
    if backend.pre_tokenizer is not None:
        return isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace)
    return backend.normalizer is not None and json.loads(backend.normalizer.__getstate__()) == _OLDEST_SPACING
