"""Conversations whose turns come in parts, as messages of the contract."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from loraplex.v1.prompt_pb2 import ChatMessage, ToolCall
from loraplex_service.http.parameters import Draft, bounded, wrong
from loraplex_service.validation.limits import LIMITS, Text


class Texts:
    """The parts of one text, which are joined once: a field that grows keeps all that it was before."""

    def __init__(self, of: str) -> None:
        """`of`: the field of the contract that the text becomes, whose limit holds for it."""
        limit = LIMITS[of]
        assert isinstance(limit, Text)
        self._room = limit.most
        self._parts: list[str] = []

    def add(self, part: str) -> None:
        """Add a part. Raises ValueError where the text becomes longer than its field may be."""
        self._room -= len(part)
        if self._room < 0:
            raise ValueError(f"the text has {-self._room} characters too many with this part of it")
        self._parts.append(part)

    @property
    def joined(self) -> str | None:
        """The text; None: it has no parts."""
        return "".join(self._parts) if self._parts else None


@dataclass(slots=True)
class Turn:
    """A message in the making."""

    role: str
    place: str  # in the body
    said: Texts = field(default_factory=partial(Texts, "ChatMessage.content"))
    thought: Texts = field(default_factory=partial(Texts, "ChatMessage.reasoning_content"))
    calls: list[ToolCall] = field(default_factory=list)
    answers: str | None = None  # the id of the call whose result this is
    places: dict[str, str] = field(default_factory=dict)  # in the body, of fields that are not at `place`
    call_places: dict[str, str] = field(default_factory=dict)  # the places of the calls, by their ids

    def call(self, call: ToolCall, place: str, keys: Mapping[str, str]) -> None:
        """Add a call. `keys`: of the body, for fields that have other names. Raises ValueError for one that is none."""
        if not call.name:
            raise ValueError("name: is empty")
        path = f"tool_calls[{len(self.calls)}]"
        self.places |= {path: place, **{f"{path}.{name}": f"{place}.{key}" for name, key in keys.items()}}
        self.call_places[call.id] = place
        self.calls.append(call)
        bounded(self.calls, "ChatMessage.tool_calls")

    @property
    def message(self) -> ChatMessage:
        """The message."""
        return ChatMessage(
            role=self.role,
            content=self.said.joined,
            reasoning_content=self.thought.joined,
            tool_calls=self.calls,
            tool_call_id=self.answers,
        )


def put_turns(draft: Draft, turns: Sequence[Turn]) -> None:
    """Make each turn a message. Raises Refusal for calls and results that do not belong together."""
    _check_results(turns)
    messages = draft.message.prompt.chat.messages
    for turn in turns:
        path = f"prompt.chat.messages[{len(messages)}]"
        draft.paths += [(path, turn.place), *((f"{path}.{name}", place) for name, place in turn.places.items())]
        messages.append(turn.message)


def _check_results(turns: Sequence[Turn]) -> None:
    """Each result is that of a call before it, and each call has one where the conversation goes on."""
    waiting: dict[str, str] = {}
    known: set[str] = set()
    for turn in turns:
        if turn.answers is not None:
            if turn.answers not in known:
                raise wrong(turn.place, f"there is no call {turn.answers[:64]!r} before it")
            waiting.pop(turn.answers, None)
        if turn is not turns[-1]:
            waiting |= turn.call_places
        known |= turn.call_places.keys()
    for call, place in waiting.items():
        raise wrong(place, f"the call {call[:64]!r} has no result, and the conversation goes on")
