"""What a caller sends in confidence, its credentials and its texts, is in nothing that the server says or writes."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest

from loraplex.v1.inference_pb2 import StreamGenerateRequest
from loraplex.v1.inference_pb2_grpc import InferenceServiceStub
from loraplex_engine.link.logs import JsonFormatter
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.telemetry.config import OtlpConfig, UsageConfig
from loraplex_service.telemetry.logs import CallFields
from tests.service.auth.provider import Provider
from tests.service.control.test_metrics_page import scrape
from tests.service.control_plane import ControlPlane, control_plane
from tests.service.data_plane import make_spec
from tests.service.telemetry.test_otlp import Collector, Setting, setting

__all__ = ["setting"]  # a fixture

PROMPT = "confidential-prompt"


class Log(logging.Handler):
    """Everything that is logged, whatever its level, in both formats."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.addFilter(CallFields())
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += JsonFormatter("service").format(record) + logging.Formatter().format(record)


@pytest.fixture
def log() -> Iterator[Log]:
    root, handler = logging.getLogger(), Log()
    level = root.level
    root.setLevel(logging.DEBUG)
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


async def call(control: ControlPlane, authorization: str) -> str:
    """Everything that comes back, but the texts that were asked for."""
    said: list[object] = []
    async with grpc.aio.insecure_channel(control.addresses.data) as channel:
        stream = InferenceServiceStub(channel).StreamGenerate(
            StreamGenerateRequest(spec=make_spec(PROMPT, model="tiny", output={"text": False, "token_ids": True})),
            metadata=[("authorization", authorization), ("traceparent", f"00-{'a' * 32}-{'b' * 16}-01")],
        )
        with suppress(grpc.aio.AioRpcError):
            said += [message async for message in stream]
        said += [await stream.code(), await stream.details()]
        said += [tuple(await stream.initial_metadata() or ()), tuple(await stream.trailing_metadata() or ())]
    return str(said)


async def test_neither_credentials_nor_texts_are_told_to_anybody(
    setting: Setting, byte_tokenizer_directory: Path, tmp_path: Path, log: Log, capfd: pytest.CaptureFixture[str]
) -> None:
    provider, keys = Provider(tmp_path / "jwks.json"), tmp_path / "keys.yaml"
    good, good_key = make_key("acme", [Role.INFERENCE], None)
    expired, expired_key = make_key("acme", [Role.INFERENCE], datetime.now(UTC) - timedelta(seconds=1))
    write_keys(keys, KeyFile(keys=(good_key, expired_key)))
    tokens = {
        "good": good,
        "expired": expired,
        "forged": good[:-4] + "AAAA",
        "jwt": provider.token(),
        "jwt expired": provider.token(exp=1),
        "jwt forged": provider.token()[:-8] + "AAAAAAAA",
        "garbage": "a-secret-that-is-no-token",
    }
    auth, usage = AuthConfig(keys=str(keys), jwt=provider.config), tmp_path / "usage.jsonl"
    async with control_plane(
        byte_tokenizer_directory,
        tmp_path,
        auth=auth,
        access_log=True,
        metrics_listen="127.0.0.1:0",
        usage=UsageConfig(file=str(usage)),
        otlp=OtlpConfig(endpoint=setting.endpoint),
    ) as control:
        answers = {name: await call(control, f"Bearer {token}") for name, token in tokens.items()}
        answers["no bearer"] = await call(control, f"Basic {tokens['garbage']}")
        page = (await scrape(control)).text
    collector: Collector = setting.collector
    outputs = {
        "log": log.text,
        "stdout, stderr": "".join(capfd.readouterr()),
        "OTLP": str([*collector.traces, *collector.metrics]),
        "usage": usage.read_text(),
        "page": page,
        **answers,
    }
    assert {name for name, said in answers.items() if "StatusCode.OK" in said} == {"good", "jwt"}
    assert sum("StatusCode.UNAUTHENTICATED" in said for said in answers.values()) == len(answers) - 2
    for where in ("log", "OTLP", "usage", "page"):  # all of them know of the calls
        assert "acme" in outputs[where], where
    secrets = {PROMPT} | {part for token in tokens.values() for part in (token, token[12:], token.split(".")[-1])}
    assert [(where, secret) for where, said in outputs.items() for secret in secrets if secret in said] == []
