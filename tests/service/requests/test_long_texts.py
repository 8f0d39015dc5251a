"""Texts that are too long, or many at once: refused before anything is done with them, or each in its turn."""

import asyncio
import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from loraplex import InvalidArgument
from loraplex.v1.prompt_pb2 import Prompt
from loraplex.v1.tokenizer_pb2 import TokenizeRequest
from loraplex_service.admission.tenants import Tenants
from loraplex_service.errors import InvalidRequest, PromptTooLong
from loraplex_service.requests.prompts import PIECE, TextWork
from loraplex_service.requests.turns import Pieces, TurnLimits, Turns
from loraplex_service.text import MAX_TOKENS, IncrementalDetokenizer, Tokenizer
from loraplex_service.text.token_decoders import BYTE_ALPHABET
from loraplex_service.text.token_lengths import longest_token_bytes
from loraplex_service.validation.checks import check_request
from tests.service.control_plane import ControlPlane
from tests.service.data_plane import DataPlane, data_plane, failure, make_spec
from tests.waits import MOST_SECONDS

REPOSITORY = Path(__file__).resolve().parents[3]
REAL = [*sorted((REPOSITORY / ".." / "shared" / "data" / "tokenizers").glob("*/"))]


@pytest.fixture
def never_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was tokenised")

    monkeypatch.setattr(Tokenizer, "_encode", never)


@pytest.mark.usefixtures("never_tokenised")
async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(plane: DataPlane) -> None:
    failed = await failure(plane.generate(make_spec("x" * 10_000)))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
    assert "at least 2000 tokens" in failed.message  # the longest of this vocabulary has five bytes


@pytest.mark.usefixtures("never_tokenised")
async def test_a_conversation_that_cannot_fit_is_refused_before_it_is_tokenised(plane: DataPlane) -> None:
    chat = {"messages": [{"role": "user", "content": "x" * 10_000}]}
    failed = await failure(plane.generate(make_spec(prompt={"chat": chat})))
    assert failed.reason == "PROMPT_TOO_LONG"


def test_a_text_of_more_bytes_than_any_may_have_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="from 1 to 2097152 bytes"):
        check_request(TokenizeRequest(model="demo", prompt=Prompt(text="é" * (1 << 20) + "x")))


async def test_a_long_text_that_is_cut_to_its_end_is_tokenised(plane: DataPlane) -> None:
    await plane.generate(make_spec(prompt={"text": "x" * 10_000 + "end", "truncate_to_tokens": 3}))
    assert plane.engine.requests[0].prompt_token_ids == list(b"end")


async def test_a_text_of_more_tokens_than_any_prompt_may_have_is_refused_even_if_few_are_kept(plane: DataPlane) -> None:
    prompt = {"text": "x" * (MAX_TOKENS + 1), "truncate_to_tokens": 3}
    failed = await failure(plane.generate(make_spec(prompt=prompt)))
    assert failed.reason == "INVALID_PARAMETER"
    assert "spec.prompt.text: comes to 262145 tokens; 262144 are allowed" in failed.message


@pytest.mark.parametrize("literal", [False, True])
async def test_a_text_of_more_tokens_than_are_told_is_refused(control: ControlPlane, literal: bool) -> None:
    prompt = Prompt(text="x" * (MAX_TOKENS + 1), literal_content=literal)
    with pytest.raises(InvalidArgument, match="262145 tokens; 262144 are allowed"):
        await control.client.tokenize("tiny", prompt)


async def test_a_text_of_as_many_tokens_as_a_prompt_may_have_is_told_whole(control: ControlPlane) -> None:
    assert len((await control.client.tokenize("tiny", "x" * MAX_TOKENS)).token_ids) == MAX_TOKENS


async def test_token_ids_that_are_too_many_are_refused_by_their_number(plane: DataPlane) -> None:
    failed = await failure(plane.generate(make_spec(prompt={"token_ids": {"ids": [1] * 1000}})))
    assert (failed.reason, "has 1000 tokens" in failed.message) == ("PROMPT_TOO_LONG", True)


async def test_long_texts_of_one_tenant_do_not_keep_out_anothers(byte_tokenizer: Tokenizer) -> None:
    go_on = threading.Event()
    encode = byte_tokenizer.encode

    class Held:
        """The tokenizer, with texts of x that take as long as the test wants."""

        def __getattr__(self, name: str) -> Any:
            return getattr(byte_tokenizer, name)

        def encode(self, text: str, *rest: Any) -> list[int]:
            if text[0] == "x":
                go_on.wait(MOST_SECONDS)
            return encode(text, *rest)

    async with data_plane(byte_tokenizer) as plane:
        model = replace(plane.models.models["demo"], tokenizer=Held())  # type: ignore[arg-type]
        plane.models.models["demo"] = model
        plane.servicer._preparation._texts = TextWork(
            plane.servicer._preparation._texts.renderer,
            plane.servicer._preparation._texts.rendering,
            Turns("texts cannot be tokenised", TurnLimits(at_once=2, size_at_once=1 << 20, size_in_all=40_000)),
            plane.servicer._preparation._texts.tokens,
        )

        def spec(letter: str) -> Any:
            return make_spec(prompt={"text": letter * 9000, "truncate_to_tokens": 3})

        acme = [("loraplex-tenant", "acme")]
        many = [asyncio.ensure_future(plane.generate(spec("x"), metadata=acme)) for _ in range(6)]
        done, _ = await asyncio.wait(many, return_when=asyncio.FIRST_COMPLETED)
        assert isinstance(done.pop().exception(), grpc.aio.AioRpcError)
        other = asyncio.ensure_future(plane.generate(spec("y")))
        await asyncio.wait([other], timeout=0.1)
        go_on.set()
        await other
        ends = await asyncio.gather(*many, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert {end.code() for end in refused} == {grpc.StatusCode.UNAVAILABLE}
    assert 0 < len(refused) < len(ends)


async def test_one_list_of_many_tokens_is_worked_on_at_a_time(plane: DataPlane) -> None:
    texts, tenant = plane.servicer._preparation._texts, Tenants().get("default")
    order: list[str] = []

    def work(name: str) -> Pieces[None]:
        for _ in range(3):
            order.append(name)
            yield

    await asyncio.gather(*(texts.on_tokens(tenant, 9000, work(name)) for name in ("first", "second")))
    assert order == [*["first"] * 3, *["second"] * 3]


async def test_others_are_served_between_the_pieces_of_a_list_of_many_tokens(
    control: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[int] = []  # a push of so many tokens; 0: others are served
    push = IncrementalDetokenizer.push

    def watched(self: IncrementalDetokenizer, token_ids: Sequence[int]) -> str:
        moments.append(len(token_ids))
        return push(self, token_ids)

    async def others() -> None:
        while True:
            moments.append(0)
            await asyncio.sleep(0)

    monkeypatch.setattr(IncrementalDetokenizer, "push", watched)
    serving = asyncio.create_task(others())
    await control.client.detokenize("tiny", [97] * MAX_TOKENS)
    serving.cancel()
    assert sum(moments) >= MAX_TOKENS
    assert max(moments) <= PIECE
    assert (PIECE, PIECE) not in pairwise(moments)


async def test_long_chats_of_one_tenant_do_not_keep_out_anothers(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(byte_tokenizer_directory, tmp_path / "model")
    template = "{% for number in range(99999) %}{% endfor %}{{ messages[0].content }}"
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    async with data_plane(Tokenizer.load(model)) as plane:

        async def say(tenant: str, text: str) -> None:
            chat = {"messages": [{"role": "user", "content": text}]}
            spec = make_spec(prompt={"chat": chat, "truncate_to_tokens": 3})
            await plane.generate(spec, metadata=(("loraplex-tenant", tenant),))

        loud = [asyncio.ensure_future(say("loud", "x" * 200_000)) for _ in range(16)]
        await asyncio.wait(loud, return_when=asyncio.FIRST_COMPLETED)
        await say("quiet", "hi")
        answered = sum(call.done() for call in loud)
        await asyncio.gather(*loud)
    assert answered < 8


async def test_places_of_tokens_are_told_for_texts_of_some_length_alone(control: ControlPlane) -> None:
    with pytest.raises(InvalidArgument, match="32768 bytes"):
        await control.client.tokenize("tiny", "x" * 32_769, include_offsets=True)
    assert len((await control.client.tokenize("tiny", "x" * 32_769)).token_ids) == 32_769


async def test_tokens_that_come_to_too_much_text_are_refused(
    control: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_service.control.tokenizer.MAX_TEXT_CHARS", 1 << 20)  # the longest token here has five
    with pytest.raises(InvalidArgument, match="1048576 characters"):
        await control.client.detokenize("tiny", [256] * (1 << 18), skip_special_tokens=False)


# ---- how long a token can be -----------------------------------------------------------------------------------------


def byte_level(**changes: Any) -> tokenizers.Tokenizer:
    vocabulary = {char: byte for char, byte in BYTE_ALPHABET.items()} | {"Ġ" * 100: 256}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


def test_the_longest_token_of_a_vocabulary_of_bytes() -> None:
    assert longest_token_bytes(byte_level()) == 100


def test_a_text_that_is_composed_may_be_longer() -> None:
    assert longest_token_bytes(byte_level(normalizer=normalizers.NFC())) == 400


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Replace("ab", "")},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.Split(" ", "removed")},
        {"model": models.WordLevel({"a": 0}, "a")},
        {"model": models.BPE({"a": 0}, [])},
    ],
    ids=str,
)
def test_what_may_drop_text_has_no_longest_token(changes: dict[str, Any]) -> None:
    assert longest_token_bytes(byte_level(**changes)) is None


def test_a_token_that_takes_the_space_around_it_has_no_length() -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert longest_token_bytes(backend) is None


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
@pytest.mark.parametrize("text", [" " * 5000, "ÃĥÃĤ" * 900, "각" * 999, "административ " * 300, "\n" * 3000])
def test_no_text_has_fewer_tokens_than_its_length_says(path: Path, text: str) -> None:
    tokenizer = Tokenizer.load(path)
    assert len(tokenizer.encode(text)) >= tokenizer.least_tokens(len(text.encode()))


def test_a_refusal_says_how_many_tokens_there_are_at_least() -> None:
    error = PromptTooLong.of("spec.prompt", 7, 5, least="at least ")
    assert str(error).startswith(
        "spec.prompt: has at least 7 tokens; the context of 5, less one for the output, takes 4"
    )
