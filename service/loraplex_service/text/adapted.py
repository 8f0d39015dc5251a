"""The text of an adapter: its base's tokenizer, with the tokens and the chat template that lie beside its weights.

These files come from the caller that registers the adapter, so none of their code runs in this process, and little is
used: tokens that were added, which of them ends the text, and the template, which is rendered where all templates are.
The vocabulary and its rules stay the base's. So an adapter takes kilobytes, not the hundred megabytes of a tokenizer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken, models

from loraplex_service.text.chat_template import ChatTemplate
from loraplex_service.text.errors import TokenizerError
from loraplex_service.text.literal import LiteralEncoder, Span
from loraplex_service.text.message_syntax import message_syntax
from loraplex_service.text.model_files import ModelFiles, read_file
from loraplex_service.text.token_decoders import PieceTable
from loraplex_service.text.token_lengths import NFC_FACTOR
from loraplex_service.text.tokenizer import MAX_TOKENS, Encoding, Tokenizer, check_count

MAX_ADDED_TOKENS = 4096
MAX_TOKEN_CHARS = 1024
MAX_LISTED = 5  # tokens in a warning
_GAP, _GAP_ID = "\0gap", 0  # what the splitter calls text between added tokens


class _Token(msgspec.Struct):
    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def added(self) -> AddedToken:
        return AddedToken(
            self.content,
            single_word=self.single_word,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            normalized=self.normalized,
            special=self.special,
        )


class _Rules(msgspec.Struct):
    """The parts of tokenizer.json that say how text is cut. They are compared, and never run."""

    added_tokens: list[_Token] = []
    model: dict[str, msgspec.Raw] = {}
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None

    def differences(self, base: "_Rules") -> Iterator[str]:
        for name in ("vocab", "merges"):
            if _canonical(self.model.get(name)) != _canonical(base.model.get(name)):
                yield name
        for name in ("normalizer", "pre_tokenizer", "post_processor"):
            if not _alike(getattr(self, name), getattr(base, name)):
                yield name


@dataclass(frozen=True, slots=True)
class AdapterText:
    """The tokenizer and template of an adapter's requests, and warnings about the parts of its files that are not
    used.
    """

    tokenizer: Tokenizer
    warnings: tuple[str, ...] = ()
    num_chars: int = 0  # that it takes beside the base's


class AdaptedTokenizer(Tokenizer):
    """A base model's tokenizer with tokens that an adapter adds."""

    def __init__(self, base: Tokenizer, files: ModelFiles, added: Mapping[int, AddedToken]) -> None:
        self.directory = base.directory
        self._base = base
        self._backend = base._backend
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._added_ids = {content: token_id for token_id, content in self._added.items()}
        self._splitter = _splitter(self._backend, added) if added else None
        written = self._splitter.get_added_tokens_decoder() if self._splitter is not None else {}
        self._split_ids = {found: self.token_to_id(token.content) for found, token in written.items()}
        self._longest_bytes = _longest_bytes(base, added)
        self._lead = _lead(base)
        self._before, self._behind = _surroundings(base)
        named = files.named_special_tokens()
        own = [token_id for token in [*named.values(), *files.other_special_tokens()] for token_id in self._ids(token)]
        special = [token_id for token_id, token in added.items() if token.special]
        self.generation_config = base.generation_config
        self.bos_token_id = base.bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys([*self._ids(named.get("eos_token")), *base.eos_token_ids]))
        self.special_token_ids = (base.special_token_ids - added.keys()) | {*own, *special}
        decoder = base.pieces(skip_special_tokens=False).decoder
        self._pieces = PieceTable(self.id_to_token, decoder)
        self._pieces_without_special = PieceTable(self.id_to_token, decoder, skipped=self.special_token_ids)
        self.special_tokens = {**base.special_tokens, **named}
        templates = files.chat_templates or (base.chat_template.sources if base.chat_template is not None else {})
        self.chat_template = ChatTemplate(templates, **self.special_tokens) if templates else None
        own_templates = files.chat_templates.values()
        self.message_syntax = message_syntax(own_templates) if own_templates else base.message_syntax

    @property
    def num_token_ids(self) -> int:
        return max(self._base.num_token_ids, max(self._added, default=-1) + 1)

    @property
    def vocab_size(self) -> int:
        return self._base.vocab_size + sum(self._base.id_to_token(token_id) is None for token_id in self._added)

    def encode(
        self, text: str, add_special_tokens: bool = True, most: int = MAX_TOKENS, literal: Sequence[Span] = ()
    ) -> list[int]:
        if self._splitter is None:
            return super().encode(text, add_special_tokens, most, literal)
        token_ids = list(self._before) if add_special_tokens else []
        for token_id, start, end in self._split(text, literal):
            token_ids.extend(self._piece_ids(text, start, end, literal) if token_id is None else [token_id])
        token_ids.extend(self._behind if add_special_tokens else [])
        check_count(len(token_ids), most)
        return token_ids

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True, literal: Sequence[Span] = ()) -> Encoding:
        if self._splitter is None:
            return super().encode_with_offsets(text, add_special_tokens, literal)
        found = Encoding([], [])
        for token_id, start, end in self._split(text, literal):
            part = Encoding([token_id], [(0, end - start)]) if token_id is not None else None
            part = part or self._piece(text, start, end, literal)
            found.token_ids.extend(part.token_ids)
            found.offsets.extend((start + first, start + last) for first, last in part.offsets)
        if not add_special_tokens:
            return found
        before, behind = [(0, 0)] * len(self._before), [(0, 0)] * len(self._behind)
        check_count(len(found.token_ids))
        return Encoding([*self._before, *found.token_ids, *self._behind], [*before, *found.offsets, *behind])

    def token_to_id(self, token: str) -> int | None:
        found = self._added_ids.get(token)
        return self._base.token_to_id(token) if found is None else found

    def id_to_token(self, token_id: int) -> str | None:
        return self._added.get(token_id) or self._base.id_to_token(token_id)

    @cached_property
    def _literal_splitter(self) -> LiteralEncoder:
        assert self._splitter is not None
        return LiteralEncoder(self._splitter, self.chat_template.sources.values() if self.chat_template else ())

    def _split(self, text: str, literal: Sequence[Span]) -> Iterator[tuple[int | None, int, int]]:
        """Split a text at added tokens: (id, start, end) of each token, with None as the id of the text between."""
        encoder, done = self._literal_splitter, 0
        ids, offsets = encoder.encode(text, literal, self._run(add_special_tokens=False))
        for found, (start, end) in zip(ids, offsets, strict=True):
            if found == _GAP_ID:  # the places of what was normalised are not exact: a gap is what is left
                continue
            if start > done:
                yield None, done, start
            yield self._split_ids[found], start, end
            done = end
        if done < len(text):
            yield None, done, len(text)

    def _piece(self, text: str, start: int, end: int, literal: Sequence[Span]) -> Encoding:
        """Encode text between added tokens."""
        lead, inside = self._inside(start, end, literal)
        found = super().encode_with_offsets(lead + text[start:end], False, inside)
        if not lead:
            return found
        shifted = [(first - len(lead), last - len(lead)) for first, last in found.offsets[1:]]
        return Encoding(found.token_ids[1:], shifted)

    def _piece_ids(self, text: str, start: int, end: int, literal: Sequence[Span]) -> list[int]:
        """Encode as `_piece` does, without the offsets."""
        lead, inside = self._inside(start, end, literal)
        token_ids = super().encode(lead + text[start:end], False, literal=inside)
        return token_ids[1:] if lead else token_ids

    def _inside(self, start: int, end: int, literal: Sequence[Span]) -> tuple[str, list[Span]]:
        """The text to put before a piece that follows an added token, so that it is not treated as a text's beginning;
        and which parts of both together are literal."""
        lead = self._lead if start else ""
        shift = len(lead) - start
        return lead, [(max(a, start) + shift, min(b, end) + shift) for a, b in literal if a < end and b > start]

    def _ids(self, token: str | None) -> list[int]:
        token_id = None if token is None else self.token_to_id(token)
        return [] if token_id is None else [token_id]


def adapter_text(directory: Path, base: Tokenizer) -> AdapterText:
    """Read the text files beside an adapter's weights. Off the event loop. Raises TokenizerError, OSError."""
    files = ModelFiles.read_beside_adapter(directory)
    rules = _read_rules(directory / "tokenizer.json")
    warnings: list[str] = []
    if rules is not None:
        base_rules = _read_rules(base.directory / "tokenizer.json")
        differing = list(rules.differences(base_rules)) if base_rules is not None else []
        if differing:
            warnings.append(
                f"tokenizer.json: its {', '.join(differing)} differ from those of the base model, which are used; "
                "where that matters, send token ids"
            )
    tokens = {token.id: token.added() for token in (rules.added_tokens if rules is not None else [])}
    added = _new_tokens({**files.added_tokens, **tokens}, base, warnings)
    num_chars = sum(len(template) for template in files.chat_templates.values())
    num_chars += sum(len(token.content) for token in added.values())
    return AdapterText(AdaptedTokenizer(base, files, added), tuple(warnings), num_chars)


def _new_tokens(tokens: Mapping[int, AddedToken], base: Tokenizer, warnings: list[str]) -> dict[int, AddedToken]:
    """The tokens that the base does not have. Tokens whose ids the base uses otherwise go to `warnings`."""
    if len(tokens) > MAX_ADDED_TOKENS + len(base.added_token_ids):
        raise TokenizerError(f"{len(tokens)} added tokens: at most {MAX_ADDED_TOKENS} beside the base's are allowed")
    added, taken = {}, []
    for token_id, token in tokens.items():
        if base.token_to_id(token.content) == token_id:
            continue
        if not 0 < len(token.content) <= MAX_TOKEN_CHARS or token.content == _GAP or not 0 <= token_id < 1 << 31:
            raise TokenizerError(f"added token {token_id}: 1 to {MAX_TOKEN_CHARS} characters are allowed")
        renamed = base.id_to_token(token_id) is not None and token_id not in base.added_token_ids
        if renamed or base.token_to_id(token.content) is not None:
            taken.append(token.content)
        else:
            added[token_id] = token
    if taken:
        warnings.append(
            f"{_listed(taken)}: not added, because the base's tokenizer gives its id or its text to another"
        )
    return added


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(repr(name[:80]) for name in names[:MAX_LISTED])
    return listed if len(names) <= MAX_LISTED else f"{listed} and {len(names) - MAX_LISTED} more tokens"


def _splitter(backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken]) -> tokenizers.Tokenizer:
    """Finds the added tokens in a text as the library does, the base's and these; all else is one gap."""
    splitter = tokenizers.Tokenizer(models.WordLevel({_GAP: _GAP_ID}, unk_token=_GAP))
    splitter.normalizer = backend.normalizer
    renamed = added.keys()
    base = backend.get_added_tokens_decoder()
    splitter.add_tokens([token for token_id, token in base.items() if token_id not in renamed] + list(added.values()))
    splitter.encode_special_tokens = backend.encode_special_tokens
    return splitter


def _longest_bytes(base: Tokenizer, added: Mapping[int, AddedToken]) -> int | None:
    """The bound of `longest_token_bytes`; None: some token takes all the space around it."""
    if base._longest_bytes is None or any(token.lstrip or token.rstrip for token in added.values()):
        return None
    return max([base._longest_bytes, *(NFC_FACTOR * len(token.content.encode()) for token in added.values())])


def _surroundings(base: Tokenizer) -> tuple[list[int], list[int]]:
    """The token ids that the tokenizer puts before and after every text."""
    with_them, alone = base.encode("a"), base.encode("a", False)
    for start in range(len(with_them) - len(alone) + 1):
        if with_them[start : start + len(alone)] == alone:
            return with_them[:start], with_them[start + len(alone) :]
    raise TokenizerError("the base's tokenizer puts no fixed tokens before and behind a text")


def _lead(base: Tokenizer) -> str:
    """The text to put before a piece so that it is not a text's beginning; "": the tokenizer treats both alike.

    Raises TokenizerError if the tokenizer treats them differently and has no added token to put there.
    """
    state = base._backend.pre_tokenizer.__getstate__() if base._backend.pre_tokenizer is not None else b""
    if b'"prepend_scheme":"first"' not in state:
        return ""
    for token in base._backend.get_added_tokens_decoder().values():
        if not token.lstrip and not token.rstrip and not token.single_word:
            return str(token.content)
    raise TokenizerError("the base's tokenizer treats the beginning of a text differently, and has no added tokens")


def _read_rules(path: Path) -> _Rules | None:
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(read_file(path), type=_Rules)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise TokenizerError(f"{path.name}: cannot be read as a tokenizer ({error})") from error


def _canonical(raw: msgspec.Raw | None) -> bytes:
    """One form for all spellings of a vocabulary or of merges: with or without spaces, pairs as lists or as text."""
    return b"" if raw is None else bytes(raw).translate(None, b' \t\r\n[]",')


def _alike(one: Any, other: Any) -> bool:
    """Whether two parts of tokenizer.json mean the same: older files leave out switches that have a default."""
    if isinstance(one, dict) and isinstance(other, dict):
        both = one.keys() & other.keys()
        alone = [*(one[key] for key in one.keys() - both), *(other[key] for key in other.keys() - both)]
        return all(_alike(one[key], other[key]) for key in both) and all(isinstance(value, bool) for value in alone)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)
