"""Encoding of texts in which a spelled control token, such as in a user's message, must stay plain text."""

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import tokenizers

from loraplex_service.text.errors import TokenizerError

Span = tuple[int, int]  # [start, end), in characters


class LiteralEncoder:
    """Encodes a text so that its literal parts yield no control token. The rest is encoded as the tokenizer does it.

    Control tokens are the special tokens, and the added tokens that the chat template writes. A text whose literal
    parts spell none is encoded by the tokenizer itself. Other texts are encoded by its twin, in which control tokens
    have secret names. In the rest of the text these names replace the control tokens; to the twin, a spelled token is
    plain text. The twin is made when it is first needed.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, template_sources: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        sources = "\n".join(template_sources)
        self._names = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if (not tokenizer.encode_special_tokens if token.special else token.content.strip() in sources)
            and token.content.strip()
        }
        secret = secrets.token_hex(8)
        self._secrets = {name: f"\ue000{secret}{token_id:x}\ue001" for token_id, name in self._names.items()}
        self._unknown_id = _unknown_id(tokenizer)

    def encode(
        self, text: str, literal: Sequence[Span], run: Callable[[tokenizers.Tokenizer, str], Any]
    ) -> tuple[list[int], list[Span]]:
        """The ids and offsets of a text. `literal`: its literal parts, in order and apart. `run`: encodes with a
        tokenizer.

        Raises TokenizerError if the tokenizer still makes a control token of a literal part.
        """
        encoding, places = self._encoded(text, literal, run)
        return encoding.ids, [places.original(span) for span in encoding.offsets]

    def ids(self, text: str, literal: Sequence[Span], run: Callable[[tokenizers.Tokenizer, str], Any]) -> list[int]:
        """Encode without offsets: to take all of them at once holds the interpreter lock for long."""
        ids: list[int] = self._encoded(text, literal, run)[0].ids
        return ids

    def _encoded(
        self, text: str, literal: Sequence[Span], run: Callable[[tokenizers.Tokenizer, str], Any]
    ) -> tuple[Any, "_Places"]:
        """What the library makes of the text, and where in it that is."""
        encoding, places = run(self._tokenizer, text), _Places(())
        if self._spelled(text, literal, encoding, places) is None:
            return encoding, places
        renamed, places = self._renamed(text, literal)
        encoding = run(self._twin, renamed)
        wrong = self._spelled(text, literal, encoding, places)
        if wrong is not None:
            raise TokenizerError(f"the tokenizer makes the control token {wrong!r} of text that is to be literal.")
        return encoding, places

    def _spelled(self, text: str, literal: Sequence[Span], encoding: Any, places: "_Places") -> str | None:
        """A control token that overlaps a literal part; None: there is none."""
        starts = [start for start, _ in literal]
        for index, token_id in enumerate(encoding.ids):
            name = self._names.get(token_id)
            if name is None:
                continue
            start, end = places.original(encoding.token_to_chars(index) or (0, 0))  # none: the tokenizer added it
            said = text[start:end]
            if token_id == self._unknown_id and said.strip() != name:
                continue  # what the vocabulary does not have is unknown wherever it is
            start, end = start + len(said) - len(said.lstrip()), end - (len(said) - len(said.rstrip()))
            before = bisect_right(starts, end - 1) - 1
            if start < end and before >= 0 and literal[before][1] > start:
                return name
        return None

    def _renamed(self, text: str, literal: Sequence[Span]) -> tuple[str, "_Places"]:
        """The text for the twin: the control tokens outside the literal parts have their secret names."""
        pieces: list[str] = []
        changes: list[tuple[int, int]] = []
        end = 0
        for start, stop in _between(literal, len(text)):
            pieces.append(text[end:start])
            for found in self._pattern.finditer(text, start, stop):
                secret = self._secrets[found[0]]
                pieces += [text[start : found.start()], secret]
                changes.append((found.start(), len(secret) - len(found[0])))
                start = found.end()
            pieces.append(text[start:stop])
            end = stop
        pieces.append(text[end:])
        return "".join(pieces), _Places(changes)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(_longest_of(sorted(self._secrets)))

    @cached_property
    def _twin(self) -> tokenizers.Tokenizer:
        state = json.loads(self._tokenizer.to_str())
        for token in state["added_tokens"]:
            token["content"] = self._secrets.get(token["content"], token["content"])
        model = state["model"]
        model["vocab"] = self._renamed_vocabulary(model["vocab"])
        if model.get("unk_token") is not None:
            model["unk_token"] = self._secrets.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not self._makes_control(merge)]
        twin = tokenizers.Tokenizer.from_str(json.dumps(state))
        twin.encode_special_tokens = self._tokenizer.encode_special_tokens
        for token_id, name in self._names.items():
            assert twin.token_to_id(self._secrets[name]) == token_id
        return twin

    def _renamed_vocabulary(self, vocab: Any) -> Any:
        if isinstance(vocab, dict):
            return {self._secrets.get(token, token): token_id for token, token_id in vocab.items()}
        return [[self._secrets.get(token, token), score] for token, score in vocab]

    def _makes_control(self, merge: str | Sequence[str]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return not {left, right, left + right}.isdisjoint(self._secrets)


def _unknown_id(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The token that stands for text outside the vocabulary."""
    if isinstance(tokenizer.model, tokenizers.models.Unigram):
        unknown_id: int | None = json.loads(tokenizer.model.__getstate__())["unk_id"]
        return unknown_id
    unknown = getattr(tokenizer.model, "unk_token", None)
    return None if unknown is None else tokenizer.token_to_id(unknown)


class _Places:
    """Maps positions in the renamed text to the original text."""

    def __init__(self, changes: Sequence[tuple[int, int]]) -> None:
        """`changes`: the start in the original text of each renamed token, in order, and by how much it grew."""
        growths = list(accumulate((growth for _, growth in changes), initial=0))
        self._growths = growths
        self._begins = [at + before for (at, _), before in zip(changes, growths, strict=False)]

    def original(self, span: Span) -> Span:
        return self._original(span[0]), self._original(span[1])

    def _original(self, place: int) -> int:
        # A token never begins or ends inside of a name, so what is behind the beginning of one is behind its end.
        return place - self._growths[bisect_right(self._begins, place - 1)]


def _between(literal: Sequence[Span], length: int) -> Iterator[Span]:
    """The parts of the text that are not literal."""
    start = 0
    for begin, end in literal:
        if begin > start:
            yield start, begin
        start = max(start, end)
    if length > start:
        yield start, length


def _longest_of(words: Sequence[str]) -> str:
    """A regular expression for the longest of these words that begins at a place, with one way on at each character."""
    by_first: dict[str, list[str]] = {}
    for word in words:
        by_first.setdefault(word[:1], []).append(word[1:])
    ends = by_first.pop("", None) is not None
    choices = [re.escape(first) + _longest_of(rests) for first, rests in by_first.items()]
    if len(choices) == 1 and not ends:
        return choices[0]
    return f"(?:{'|'.join(choices)}){'?' if ends else ''}" if choices else ""
