"""Text to token ids and back, from the files of a model directory, without transformers and without torch."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from loraplex_service.text.backends import Backend, load_backend
from loraplex_service.text.chat_template import ChatTemplate
from loraplex_service.text.detokenizer import IncrementalDetokenizer
from loraplex_service.text.errors import TextError, TokenizerError, TooManyTokensError
from loraplex_service.text.literal import LiteralEncoder, Span
from loraplex_service.text.message_syntax import message_syntax
from loraplex_service.text.model_files import ModelFiles
from loraplex_service.text.token_decoders import PieceTable, token_decoder
from loraplex_service.text.token_lengths import longest_token_bytes

# Of one text. To take more from the library, or to drop them, would hold the interpreter lock for too long.
MAX_TOKENS = 1 << 18


@dataclass(frozen=True, slots=True)
class Encoding:
    """A text as tokens, and which part of it each token stands for."""

    token_ids: list[int]
    offsets: list[tuple[int, int]]  # [start, end) in characters (code points) of the text; (0, 0) for added BOS and EOS


class Tokenizer:
    """One model's vocabulary and rules. Shared by all its requests; may be called from any thread."""

    def __init__(self, backend: Backend, files: ModelFiles) -> None:
        self.directory = files.directory
        self._backend = backend.tokenizer
        self.generation_config: Mapping[str, Any] = files.generation_config  # what lies beside it, as it is
        named = files.named_special_tokens()
        bos = files.special_token("bos_token", backend.bos_token)
        eos = files.special_token("eos_token", backend.eos_token)
        # Null in tokenizer_config.json says that there is none, whatever config.json says.
        declared = "bos_token" in files.tokenizer_config
        bos_ids = self._ids(bos) or (() if declared else files.token_ids("bos_token_id"))
        self.bos_token_id: int | None = next(iter(bos_ids), None)
        # Chat models name their turn's end in generation_config.json and the text's end in the tokenizer: both end it.
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*self._ids(eos), *files.token_ids("eos_token_id")]))
        self.special_token_ids: frozenset[int] = frozenset(
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special
        ) | frozenset(
            token_id for token in [*named.values(), *files.other_special_tokens()] for token_id in self._ids(token)
        )
        decoder_state = self._backend.decoder.__getstate__() if self._backend.decoder is not None else b"null"
        try:
            decoder = token_decoder(json.loads(decoder_state))
        except TokenizerError as error:
            raise TokenizerError(f"{files.directory}: {error}") from error
        self._pieces = PieceTable(self.id_to_token, decoder)
        self._pieces_without_special = PieceTable(self.id_to_token, decoder, skipped=self.special_token_ids)
        self._longest_bytes = longest_token_bytes(self._backend)
        known = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token is not None}
        self.special_tokens: Mapping[str, str] = known | named  # by name (bos_token …), as chat templates want them
        self.chat_template: ChatTemplate | None = (
            ChatTemplate(files.chat_templates, **self.special_tokens) if files.chat_templates else None
        )
        try:
            self.message_syntax = message_syntax(
                files.chat_templates.values(), files.tokenizer_config.get("response_template")
            )
        except TokenizerError as error:
            raise TokenizerError(f"{files.directory / 'tokenizer_config.json'}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face model directory. Takes up to seconds: call it off the event loop.

        Raises TokenizerError, which names the file, what is wrong with it and what to do.
        """
        files = ModelFiles.read(path)
        return cls(load_backend(files), files)

    def use_chat_template(self, source: str) -> None:
        """Put another template in the place of the model's own; unless the files declare how messages are read, they
        are read by its marks. Before the first request. Raises TemplateError."""
        self.chat_template = ChatTemplate(source, **self.special_tokens)
        if self.message_syntax is None or not self.message_syntax.is_declared:
            self.message_syntax = message_syntax([source])

    @cached_property
    def num_token_ids(self) -> int:
        """The highest token id plus 1. A model's head may be padded beyond it."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: fewer than `num_token_ids` where ids are left out."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def added_token_ids(self) -> frozenset[int]:
        """The ids of added tokens, which stand for themselves beside the vocabulary's pieces of words."""
        return frozenset(self._backend.get_added_tokens_decoder())

    def least_tokens(self, num_bytes: int) -> int:
        """The fewest tokens that a text of so many UTF-8 bytes can have; 0 if the tokenizer may drop any part of it."""
        return 0 if self._longest_bytes is None else -(-num_bytes // self._longest_bytes)

    @cached_property
    def num_in_front(self) -> int:
        """The number of tokens that the tokenizer puts before a text."""
        added = self._encode(self._backend.encode_batch, "a", add_special_tokens=True).sequence_ids
        return next((place for place, sequence in enumerate(added) if sequence is not None), 0)

    def encode(
        self, text: str, add_special_tokens: bool = True, most: int = MAX_TOKENS, literal: Sequence[Span] = ()
    ) -> list[int]:
        """The ids of a text; with BOS and EOS where the model's tokenizer puts them. Of its literal parts no control
        token comes.

        Raises TextError, and TooManyTokensError for more than `most`.

        Takes about a second per million characters and leaves the interpreter to other threads meanwhile: call it in a
        thread of its own for long texts.
        """
        token_ids: list[int]
        if literal:
            token_ids = self._literal_encoder.ids(text, literal, self._run(add_special_tokens))
        else:
            token_ids = self._encode(self._backend.encode_batch_fast, text, add_special_tokens, most).ids
        check_count(len(token_ids), most)
        return token_ids

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True, literal: Sequence[Span] = ()) -> Encoding:
        """The ids of a text and where in it each comes from. Raises TextError, TooManyTokensError."""
        if literal:
            return Encoding(*self._literal_encoder.encode(text, literal, self._run(add_special_tokens)))
        encoding = self._encode(self._backend.encode_batch, text, add_special_tokens)
        return Encoding(encoding.ids, encoding.offsets)

    @cached_property
    def _literal_encoder(self) -> LiteralEncoder:
        return LiteralEncoder(self._backend, self.chat_template.sources.values() if self.chat_template else ())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence: what an IncrementalDetokenizer without a prompt gives in total.

        Equal to the `tokenizers` library, but for one case: where a run of byte tokens is partly no UTF-8, its valid
        characters are kept (as the sentencepiece library does), not replaced together with the rest.
        """
        detokenizer = IncrementalDetokenizer(self.pieces(skip_special_tokens))
        return detokenizer.push(token_ids) + detokenizer.flush()

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in its written form (`Ġthe`, `▁the`, `<|im_end|>`)."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The written form of a token; None where the vocabulary has none. Raises TextError for what is no id."""
        if not 0 <= token_id < 1 << 32:
            raise TextError(f"token id {token_id}: must be between 0 and 2^32 - 1.")
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: exact also for a token that holds a part of a character."""
        piece = self._pieces[token_id]
        return piece.encode() if isinstance(piece, str) else piece

    @cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """The tokens that have no text in grammars, and their ids."""
        ids = self.special_token_ids | set(self.eos_token_ids)
        return {token: token_id for token_id in sorted(ids) if (token := self.id_to_token(token_id))}

    @cached_property
    def vocabulary(self) -> Sequence[bytes]:
        """`token_bytes` of every id; empty for control tokens, and for ids that have no token. Takes some 0.1 s."""
        hidden = set(self.control_tokens.values())
        ids = range(self.num_token_ids)
        return [b"" if i in hidden or self.id_to_token(i) is None else self.token_bytes(i) for i in ids]

    def token_text(self, token_id: int) -> str:
        """The text of a token for people (logprobs): parts of characters are U+FFFD. Special tokens are shown."""
        return self.token_bytes(token_id).decode(errors="replace")

    def pieces(self, skip_special_tokens: bool) -> PieceTable:
        """The piece of text of every token, for detokenizers."""
        return self._pieces_without_special if skip_special_tokens else self._pieces

    @cached_property
    def message_pieces(self) -> PieceTable:
        """The pieces without special tokens, but for those by which the parts of a message are told apart."""
        marks = "" if self.message_syntax is None else self.message_syntax.marks
        skipped = [token_id for token_id in self.special_token_ids if (self.id_to_token(token_id) or " ") not in marks]
        return PieceTable(self.id_to_token, self._pieces.decoder, skipped)

    def _run(self, add_special_tokens: bool) -> Callable[[tokenizers.Tokenizer, str], Any]:
        def run(backend: tokenizers.Tokenizer, text: str) -> Any:
            if len(text) > MAX_TOKENS:  # maybe too many tokens: to drop those with their places holds the lock for long
                self._encode(backend.encode_batch_fast, text, add_special_tokens)
            return self._encode(backend.encode_batch, text, add_special_tokens)

        return run

    @staticmethod
    def _encode(encode_batch: Callable[..., Any], text: str, add_special_tokens: bool, most: int = MAX_TOKENS) -> Any:
        # A batch of one, because the library gives up the interpreter lock for batches alone.
        try:
            encoding = encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except TypeError as error:
            position = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if position is None:
                raise
            raise TextError(
                f"text: half a surrogate pair at character {position}, which is no Unicode text. Remove it."
            ) from error
        count = len(encoding)
        if count > most:
            del encoding  # an error keeps what its frames hold, and this is hundreds of bytes for each token
        check_count(count, most)
        return encoding

    def _ids(self, token: str | None) -> list[int]:
        token_id = None if token is None else self._backend.token_to_id(token)
        return [] if token_id is None else [token_id]


def check_count(count: int, most: int = MAX_TOKENS) -> None:
    """Raise TooManyTokensError if there are more tokens than `most`."""
    if count > most:
        raise TooManyTokensError(count, most)
