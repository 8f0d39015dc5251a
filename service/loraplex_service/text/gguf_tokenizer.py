"""The text of a model in its GGUF file: vocabulary, special tokens, chat templates and sampling defaults.

`tokenizer.ggml.pre` names how a byte-level tokenizer cuts a text before its merges; the rules are those of the models'
own tokenizers.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from loraplex_adapters.files.gguf import GGUFError, read_gguf
from loraplex_adapters.files.gguf_tokens import KEY, end_token_ids, token_id
from loraplex_service.text.errors import TokenizerError
from loraplex_service.text.sentencepiece_model import CONTROL, USER_DEFINED, Piece, as_in_text, piece_tokenizer

UNUSED = 5
MAX_TOKENS = 1 << 20
MAX_SQUARED_CHARS = 1 << 27  # of all tokens: to find the pieces of one takes the square of its length; 2^24 are usual
PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
TEMPLATE = "tokenizer.chat_template"
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


class GGUFText(NamedTuple):
    """What a file says about text, in the spelling of Hugging Face's files, beside its vocabulary."""

    tokenizer_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    chat_templates: Mapping[str, str]


def read_metadata(path: Path) -> Mapping[str, object]:
    """The metadata of a file. Raises TokenizerError, OSError."""
    try:
        with path.open("rb") as file:
            return read_gguf(file).metadata
    except GGUFError as error:
        raise TokenizerError(f"{path}: {error}") from error


def read_text(metadata: Mapping[str, object]) -> GGUFText:
    """Raises TokenizerError or GGUFError for an entry that makes no sense; its message does not name the file."""
    tokens = _tokens(metadata)
    special = {name: token_id(metadata, key) for name, key in SPECIAL.items()}
    named = {name: tokens[index] for name, index in special.items() if index is not None}
    rule = PIECES if metadata.get(KEY + "model") == "llama" else _cut(metadata)
    adds = {
        "add_bos_token": bool(metadata.get(KEY + "add_bos_token", rule.adds_bos)),
        "add_eos_token": bool(metadata.get(KEY + "add_eos_token", False)),
    }
    sampling = {name: metadata.get(f"general.sampling.{key}") for name, key in SAMPLING.items()}
    generation = {"eos_token_id": end_token_ids(metadata), **sampling}
    return GGUFText(dict.fromkeys(SPECIAL) | named | adds, generation, dict(_templates(metadata)))


def read_vocabulary(metadata: Mapping[str, object]) -> tokenizers.Tokenizer:
    """The tokenizer that the metadata describe.

    Raises TokenizerError or GGUFError; its message does not name the file.
    """
    kind = metadata.get(KEY + "model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"{KEY}model is {kind!r}: gpt2 (byte-level BPE) and llama (SentencePiece) are supported.")
    pieces, squeezes = _pieces(metadata), bool(metadata.get(KEY + "remove_extra_whitespaces", False))
    if kind == "llama" and not squeezes:
        pieces = as_in_text(pieces)
    tokenizer = _sentencepiece(metadata, pieces, squeezes) if kind == "llama" else _byte_level(metadata, pieces)
    added = [piece for piece in pieces if piece.type in (CONTROL, USER_DEFINED) and piece.piece]
    # Which tokens take the spaces behind them, files do not say: of Phi 3's models with this vocabulary most do.
    takes = kind == "llama" and metadata.get("general.architecture") == "phi3"
    tokenizer.add_tokens([_added(piece, takes and piece.piece not in PHI3_PLAIN) for piece in added])
    return tokenizer


def _added(piece: Piece, takes_spaces: bool) -> AddedToken:
    return AddedToken(piece.piece, special=piece.type == CONTROL, rstrip=takes_spaces, normalized=False)


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    tokens = metadata.get(KEY + "tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise TokenizerError(f"{KEY}tokens is missing or no list of texts: the file has no vocabulary.")
    if len(tokens) > MAX_TOKENS or sum(len(token) ** 2 for token in tokens) > MAX_SQUARED_CHARS:
        raise TokenizerError(f"{KEY}tokens has more than {MAX_TOKENS} tokens, or far longer ones than any vocabulary.")
    return tokens


def _pieces(metadata: Mapping[str, object]) -> list[Piece]:
    tokens = _tokens(metadata)
    types, scores = (
        metadata.get(KEY + key, [default] * len(tokens)) for key, default in (("token_type", 1), ("scores", 0.0))
    )
    if not isinstance(types, list) or not isinstance(scores, list) or not len(types) == len(scores) == len(tokens):
        raise TokenizerError(f"{KEY}token_type and {KEY}scores must be lists as long as {KEY}tokens.")
    return [Piece(*piece) for piece in zip(tokens, scores, types, strict=True)]


def _templates(metadata: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for key, template in metadata.items():
        name = key.removeprefix(TEMPLATE)
        if name != key and isinstance(template, str) and (not name or name.startswith(".")):
            yield name.removeprefix(".") or "default", template


# ---- SentencePiece -------------------------------------------------------------------------------------------------


def _sentencepiece(metadata: Mapping[str, object], pieces: Sequence[Piece], squeezes: bool) -> tokenizers.Tokenizer:
    return piece_tokenizer(
        pieces,
        unknown=pieces[token_id(metadata, "unknown") or 0].piece,
        prefix=bool(metadata.get(KEY + "add_space_prefix", True)),
        squeezes=squeezes,
    )


# ---- byte-level BPE ------------------------------------------------------------------------------------------------

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES


class Cut(NamedTuple):
    """How a text is cut before its merges, and what else goes with that."""

    patterns: tuple[str, ...] = ()  # one after another; then, unless they leave nothing to do, GPT-2's
    then_gpt2: bool = False
    whole_words: bool = False  # a word that is a token is taken as it is, whatever the merges say
    adds_bos: bool = False  # where the file does not say
    composes: bool = False  # NFC


PIECES = Cut(adds_bos=True)
_GPT2 = Cut(then_gpt2=True)
_DIGITS = Cut((r"\p{N}",), then_gpt2=True)
_LLAMA3 = Cut(("|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _REST)),))
_QWEN2 = Cut(("|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _REST)),))
_DEEPSEEK3 = Cut(
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
        + _SPACES,
    )
)
_GPT4O = Cut(("|".join((*(f"{words}{_CONTRACTIONS}?" for words in _CASED), r"\p{N}{1,3}", _CASED_REST)),))
CUTS: Mapping[str, Cut] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), _GPT2),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3._replace(whole_words=True, adds_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2._replace(composes=True)),
    **dict.fromkeys(("stablelm2", "hunyuan", "megrez", "grok-2"), _QWEN2),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-coder": Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "tekken": Cut(("|".join((*_CASED, r"\p{N}", _CASED_REST)),), whole_words=True, adds_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O._replace(adds_bos=True),
    "seed-coder": Cut(("|".join((_CONTRACTIONS, _WORDS, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES)),)),
}


def _cut(metadata: Mapping[str, object]) -> Cut:
    name = metadata.get(KEY + "pre")
    if not isinstance(name, str) or name not in CUTS:
        raise TokenizerError(
            f"{KEY}pre is {name!r}, which does not say how text is cut into words; known are {', '.join(CUTS)}. "
            "Convert the model anew, or serve it from its Hugging Face files."
        )
    return CUTS[name]


def _byte_level(metadata: Mapping[str, object], pieces: Sequence[Piece]) -> tokenizers.Tokenizer:
    cut, merges = _cut(metadata), metadata.get(KEY + "merges", [])
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in merges):
        raise TokenizerError(f"{KEY}merges must be a list of pairs.")
    # Where an id has no token, converters write one that no text can have.
    vocabulary = {
        piece.piece: index
        for index, piece in enumerate(pieces)
        if (piece.type, piece.piece) != (UNUSED, f"[PAD{index}]")
    }
    pairs = [(merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :]) for merge in merges]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=cut.whole_words))
    if cut.composes:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.then_gpt2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
