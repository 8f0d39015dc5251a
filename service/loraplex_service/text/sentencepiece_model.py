"""A SentencePiece `tokenizer.model` as a `tokenizers.Tokenizer` that gives the same ids as the sentencepiece library.

Converting keeps one code path for every model: offsets, added tokens and decoding are those of `tokenizers`. Format:
sentencepiece_model.proto. Equality with the library is tested in tests/service/text/test_sentencepiece.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from loraplex_service.text.errors import TokenizerError
from loraplex_service.text.token_decoders import METASPACE

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # SentencePiece.Type
MAX_PIECE_CHARS = 1024  # the longest that vocabularies have are a tenth of it: runs of spaces or dashes


class Piece(NamedTuple):
    """One entry of a vocabulary, as SentencePiece names its parts."""

    piece: str
    score: float
    type: int


def read_sentencepiece(data: bytes) -> tuple[tokenizers.Tokenizer, str | None, str | None]:
    """The tokenizer in a serialized ModelProto, its BOS and its EOS. Raises TokenizerError for what it cannot hold."""
    # Imported here: only checkpoints without tokenizer.json need it, and it takes protobuf's descriptor pool along.
    from sentencepiece import sentencepiece_model_pb2

    proto = cast(Any, sentencepiece_model_pb2).ModelProto()
    not_one = "is no SentencePiece model. A tiktoken vocabulary must come with tokenizer.json."
    try:
        proto.ParseFromString(data)
    except Exception as error:
        raise TokenizerError(not_one) from error
    if not proto.pieces:  # plain text, too, can pass for a message full of unknown fields
        raise TokenizerError(not_one)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise TokenizerError("writes spaces as suffixes or not at all, which is not supported. Provide tokenizer.json.")
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    if not rules.remove_extra_whitespaces and trainer.model_type == _BPE:
        pieces = as_in_text(pieces)
    tokenizer = tokenizers.Tokenizer(_model(trainer, pieces))
    tokenizer.normalizer = _normalizer(rules)
    tokenizer.decoder = _decoder(trainer.byte_fallback, rules.add_dummy_prefix or rules.remove_extra_whitespaces)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, special=piece.type == CONTROL, normalized=False)
            for piece in pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer, _control_piece(proto, trainer.bos_id), _control_piece(proto, trainer.eos_id)


def as_in_text(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with spaces for the marks in those that users have defined: these are found in the text itself."""
    return [
        piece._replace(piece=piece.piece.replace(METASPACE, " ")) if piece.type == USER_DEFINED else piece
        for piece in pieces
    ]


def piece_tokenizer(pieces: Sequence[Piece], unknown: str, prefix: bool, squeezes: bool) -> tokenizers.Tokenizer:
    """The tokenizer of a BPE vocabulary with tokens for single bytes, without added tokens.

    prefix: a text begins with a space. squeezes: of several spaces one is left.
    """
    tokenizer = tokenizers.Tokenizer(_bpe(pieces, unknown, True))
    tokenizer.normalizer = normalizers.Sequence(_spacing(prefix, squeezes))
    tokenizer.decoder = _decoder(True, prefix or squeezes)
    return tokenizer


def _decoder(byte_fallback: bool, strips: bool) -> decoders.Decoder:
    stages: list[Any] = [decoders.Replace(METASPACE, " ")]
    if byte_fallback:
        stages.append(decoders.ByteFallback())
    stages.append(decoders.Fuse())
    if strips:
        stages.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(stages)


def _control_piece(proto: Any, token_id: int) -> str | None:
    if 0 <= token_id < len(proto.pieces) and proto.pieces[token_id].type == CONTROL:
        return str(proto.pieces[token_id].piece)
    return None


def _model(trainer: Any, pieces: Sequence[Piece]) -> models.Model:
    if trainer.model_type == _UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type == _BPE:
        return _bpe(pieces, trainer.unk_piece, trainer.byte_fallback)
    raise TokenizerError("holds a WORD or CHAR model; BPE and Unigram are supported. Provide tokenizer.json.")


def _bpe(pieces: Sequence[Piece], unknown: str, byte_fallback: bool) -> models.Model:
    longest = max(len(piece.piece) for piece in pieces)
    if longest > MAX_PIECE_CHARS:  # to find its halves takes the square of it
        raise TokenizerError(f"holds a piece of {longest} characters: at most {MAX_PIECE_CHARS} are allowed.")
    return models.BPE(
        vocab={piece.piece: token_id for token_id, piece in enumerate(pieces)},
        merges=list(_merges(pieces)),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first: the order in which SentencePiece joins them."""
    mergeable = {piece.piece: token_id for token_id, piece in enumerate(pieces) if piece.type == NORMAL}
    for piece in sorted((piece for piece in pieces if piece.type == NORMAL), key=lambda piece: -piece.score):
        text = piece.piece
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = [(left, right) for left, right in halves if left in mergeable and right in mergeable]
        yield from sorted(known, key=lambda pair: (mergeable[pair[0]], mergeable[pair[1]]))


def _normalizer(rules: Any) -> normalizers.Normalizer:
    stages: list[Any] = []
    if rules.precompiled_charsmap:
        stages.append(normalizers.Precompiled(rules.precompiled_charsmap))
    return normalizers.Sequence([*stages, *_spacing(rules.add_dummy_prefix, rules.remove_extra_whitespaces)])


def _spacing(prefix: bool, squeezes: bool) -> list[Any]:
    stages: list[Any] = []
    if squeezes:
        stages += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        stages.append(normalizers.Prepend(METASPACE))
    return [*stages, normalizers.Replace(" ", METASPACE)]
