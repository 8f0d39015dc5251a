"""Turns token ids into whole characters, a few at a time.

The `tokenizers` library has `DecodeStream`, which decodes a window again and compares. It is not used: it holds back a
genuine U+FFFD without bound and raises "Invalid prefix" once a model emits bytes that are no UTF-8 (its
tests show both). Pieces per token need no comparison and cost about a dict access each.
"""

from collections.abc import Sequence
from contextlib import suppress

from loraplex_service.text.token_decoders import REPLACEMENT, PieceTable, decode_utf8

_MANY = 16  # tokens, of which it pays to try whether each has text of its own


class IncrementalDetokenizer:
    """The text of one output, as it grows.

    All pushes and the flush together are `tokenizer.decode(prompt + output)` without the prompt's text. A character
    that the prompt begins and the output continues belongs to the output. An empty prompt, or one of skipped special
    tokens only, makes the output the start of a text: SentencePiece models then lose a leading space.

    Holds back at most three bytes: a UTF-8 character that has begun. Bytes that are no UTF-8 come out as U+FFFD.
    """

    def __init__(self, pieces: PieceTable, prompt_token_ids: Sequence[int] = ()) -> None:
        """`pieces`: those of the tokenizer, with or without special tokens."""
        self._pieces = pieces
        self._each_byte = self._pieces.decoder.replaces_each_byte
        self._at_start = not any(self._pieces[token_id] for token_id in prompt_token_ids)
        self._pending = _unfinished_character(self._pieces, prompt_token_ids)
        self._from_prompt = bool(self._pending)  # all of what is pending was said by the prompt

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make available, possibly empty."""
        if self._at_start or self._from_prompt:
            return self._push_first(token_ids)
        pieces = self._pieces
        if len(token_ids) >= _MANY and not self._pending:
            with suppress(TypeError):  # of a piece that is bytes
                return "".join(map(pieces.__getitem__, token_ids))  # type: ignore[arg-type]
        text: list[str] = []
        for token_id in token_ids:
            piece = pieces[token_id]
            if isinstance(piece, str):
                if self._pending:
                    text.append(self._give_up())
                text.append(piece)
            elif piece:
                whole, self._pending = decode_utf8(self._pending + piece, self._each_byte)
                text.append(whole)
        return "".join(text)

    def flush(self) -> str:
        """The text still held back, once no more tokens come: U+FFFD for an unfinished character."""
        return "" if self._from_prompt else self._give_up()

    def _push_first(self, token_ids: Sequence[int]) -> str:
        """Push while no token with a piece has come yet: the piece of the first one depends on the prompt."""
        for position, token_id in enumerate(token_ids):
            piece = self._pieces[token_id]
            if not piece:
                continue
            if self._from_prompt and not _goes_on(self._pending, piece):
                self._pending = b""
            if self._at_start:
                piece = self._pieces.first(token_id)
            self._at_start = self._from_prompt = False
            if isinstance(piece, bytes):
                text, self._pending = decode_utf8(self._pending + piece, self._each_byte)
            else:
                text = piece
            return text + self.push(token_ids[position + 1 :])
        return ""

    def _give_up(self) -> str:
        replaced = REPLACEMENT * (len(self._pending) if self._each_byte else bool(self._pending))
        self._pending = b""
        return replaced


def _goes_on(begun: bytes, piece: str | bytes) -> bool:
    """Whether a piece's first byte still fits the character that `begun` begins."""
    if isinstance(piece, str):
        return False
    text, rest = decode_utf8(begun + piece[:1], replaces_each_byte=False)
    still_unfinished, finished = not text, len(text) == 1 and not rest
    return still_unfinished or finished


def _unfinished_character(pieces: PieceTable, token_ids: Sequence[int]) -> bytes:
    """The bytes of a character that the last of these tokens begin and do not finish."""
    tail = b""
    for token_id in reversed(token_ids):
        piece = pieces[token_id]
        if isinstance(piece, str) or len(tail) >= 3:  # a character that has only begun is three bytes at most
            break
        tail = piece + tail
    return decode_utf8(tail, replaces_each_byte=False)[1]
