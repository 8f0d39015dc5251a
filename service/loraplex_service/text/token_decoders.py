"""Turns single tokens into text, for each decoder that `tokenizer.json` can name.

The full decoders of the `tokenizers` library look at all tokens at once, so the text of a prefix is not always a prefix
of the text. Here every token has its own piece, and the text is the pieces one after another; the only context is a
character whose bytes are spread over several tokens, and the first token of a text, which may lose a leading space.
That is what makes streaming exact and its cost independent of the length (see `detokenizer.py`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from loraplex_service.text.errors import TokenizerError

# A piece is text of its own (str), or bytes that begin, continue or end a character together with their neighbours.
Piece = str | bytes

REPLACEMENT = "\ufffd"
METASPACE = "\u2581"  # ▁, how SentencePiece writes a space


class TokenDecoder(Protocol):
    """Turns the written form of a token into its piece."""

    @property
    def replaces_each_byte(self) -> bool:
        """Whether invalid UTF-8 gives one U+FFFD per byte (SentencePiece) or one per broken character (byte-level)."""

    def piece(self, token: str) -> Piece:
        """The piece of a token that follows others."""

    def first(self, token: str) -> Piece:
        """The piece of a token that begins a text."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 for itself, the others from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def whole_or_bytes(data: bytes) -> Piece:
    """Text where `data` is complete UTF-8, else the bytes themselves."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


@dataclass(frozen=True, slots=True)
class ByteLevelDecoder:
    """GPT-2 and its many heirs: each character of a token stands for one byte."""

    replaces_each_byte: bool = False

    def piece(self, token: str) -> Piece:
        try:
            data = bytes([BYTE_ALPHABET[char] for char in token])
        except KeyError:  # an added token with a character outside the alphabet stands for itself
            data = token.encode()
        # A token without bytes must not end the character of its neighbours, as text would.
        return whole_or_bytes(data) if data else b""

    def first(self, token: str) -> Piece:
        return self.piece(token)


@dataclass(frozen=True, slots=True)
class SentencePieceDecoder:
    """Llama, Gemma, Mistral: replacements in each token, `<0xE2>` as bytes, a leading space lost at the start."""

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool
    stripped: str  # the character that the first token loses once; empty: none
    replaces_each_byte: bool = True

    def piece(self, token: str) -> Piece:
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return whole_or_bytes(bytes([int(token[3:5], 16)]))
            except ValueError:
                return token
        return token

    def first(self, token: str) -> Piece:
        piece = self.piece(token)
        return piece.removeprefix(self.stripped) if isinstance(piece, str) else piece


@dataclass(frozen=True, slots=True)
class MetaspaceDecoder:
    """SentencePiece without byte fallback: ▁ is a space, and nothing at all in the first token."""

    replacement: str
    strips_first: bool
    replaces_each_byte: bool = True

    def piece(self, token: str) -> Piece:
        return token.replace(self.replacement, " ")

    def first(self, token: str) -> Piece:
        return token.replace(self.replacement, "" if self.strips_first else " ")


@dataclass(frozen=True, slots=True)
class WordDecoder:
    """No decoder at all: tokens are words with a space between them."""

    replaces_each_byte: bool = True

    def piece(self, token: str) -> Piece:
        return " " + token

    def first(self, token: str) -> Piece:
        return token


class PieceTable(dict[int, Piece]):
    """The piece of every token id, found out at its first use. A lookup is one dict access."""

    def __init__(
        self, token: Callable[[int], str | None], decoder: TokenDecoder, skipped: Collection[int] = ()
    ) -> None:
        self.decoder = decoder
        self._token = token
        super().__init__((token_id, b"") for token_id in skipped)

    def __missing__(self, token_id: int) -> Piece:
        token = self._token(token_id)
        if token is None:  # padding of the output matrix: not a token, no text; not kept, so the table stays bounded
            return b""
        piece = self[token_id] = self.decoder.piece(token)
        return piece

    def first(self, token_id: int) -> Piece:
        """The piece that this token has at the start of a text. Only for ids whose piece is not empty."""
        token = self._token(token_id)
        return b"" if token is None else self.decoder.first(token)


def decode_utf8(data: bytes, replaces_each_byte: bool) -> tuple[str, bytes]:
    """The text of `data`, with U+FFFD for what is no UTF-8, and the bytes of a character that has only begun."""
    text: list[str] = []
    while True:
        try:
            return "".join(text) + data.decode(), b""
        except UnicodeDecodeError as error:
            text.append(data[: error.start].decode())
            if error.reason == "unexpected end of data":
                return "".join(text), data[error.start :]
            text.append(REPLACEMENT * (error.end - error.start if replaces_each_byte else 1))
            data = data[error.end :]


def token_decoder(spec: Mapping[str, Any] | None) -> TokenDecoder:
    """The decoder that a `tokenizer.json` describes.

    Raises TokenizerError for a decoder whose text cannot be streamed token by token.
    """
    if spec is None:
        return WordDecoder()
    stages = list(_flatten(spec))
    kinds = [stage["type"] for stage in stages]
    if kinds == ["ByteLevel"]:
        return ByteLevelDecoder()
    if kinds == ["Metaspace"]:
        always = stages[0].get("add_prefix_space", True)  # before prepend_scheme existed
        scheme = stages[0].get("prepend_scheme", "always" if always else "never")
        return MetaspaceDecoder(stages[0].get("replacement", METASPACE), strips_first=scheme != "never")
    return _sentencepiece_decoder(stages)


def _flatten(spec: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if spec["type"] == "Sequence":
        for stage in spec["decoders"]:
            yield from _flatten(stage)
    else:
        yield spec


def _sentencepiece_decoder(stages: list[Mapping[str, Any]]) -> SentencePieceDecoder:
    """Replace*, then ByteFallback?, then Fuse?, then Strip? (which needs Fuse: alone it would strip every token)."""
    order = {"Replace": 0, "ByteFallback": 1, "Fuse": 2, "Strip": 3}
    kinds = [stage["type"] for stage in stages]
    ranks = [order.get(kind, -1) for kind in kinds]
    once = all(kinds.count(kind) <= 1 for kind in ("ByteFallback", "Fuse", "Strip"))
    if -1 in ranks or ranks != sorted(ranks) or not once or ("Strip" in kinds and "Fuse" not in kinds):
        raise TokenizerError(
            f"decoder {' → '.join(kinds)}: its text cannot be streamed token by token. Served are ByteLevel, "
            "Metaspace, no decoder, and Replace → ByteFallback → Fuse → Strip (each optional, Strip only after Fuse)."
        )
    replacements: list[tuple[str, str]] = []
    stripped = ""
    for stage in stages:
        if stage["type"] == "Replace":
            pattern = stage["pattern"].get("String")
            if pattern is None:
                raise TokenizerError(
                    f"decoder Replace with the pattern {stage['pattern']}: only fixed strings can be streamed exactly."
                )
            replacements.append((pattern, stage["content"]))
        elif stage["type"] == "Strip":
            if stage["stop"] != 0 or stage["start"] > 1:
                raise TokenizerError(
                    f"decoder Strip with start={stage['start']}, stop={stage['stop']}: only one leading character can "
                    "be taken off a stream."
                )
            stripped = stage["content"] if stage["start"] == 1 else ""
    return SentencePieceDecoder(tuple(replacements), "ByteFallback" in kinds, stripped)
