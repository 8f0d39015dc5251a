"""Secrets of the service's environment, which none of its processes has."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import AsyncClient
from tests.e2e.conftest import DEMO, running_server

SECRET = "known-to-the-service-alone"


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from descendants(child)


def environments(pid: int) -> dict[int, bytes]:
    return {child: Path(f"/proc/{child}/environ").read_bytes() for child in descendants(pid)}


@pytest.mark.slow
async def test_no_process_of_the_service_has_its_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("DATABASE_URL", f"postgresql://me:{SECRET}@db/loraplex")
    model = {"name": "storyteller", "model": str(DEMO / "models" / "storyteller"), "kv_cache_bytes": 16 << 20}
    with running_server(tmp_path, models=[model], adapters=[], http_listen="127.0.0.1:0") as server:
        server.wait_until_serving("storyteller")
        async with AsyncClient(server.data) as client:
            chat = [{"role": "user", "content": "Hello"}]  # whose template a process of its own renders
            await client.generate("storyteller", chat, max_tokens=1)
        found = environments(server.process.pid)
    assert len(found) >= 3  # an engine, the HTTP process, one for templates
    assert [pid for pid, environment in found.items() if SECRET.encode() in environment] == []
