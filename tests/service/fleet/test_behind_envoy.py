"""Three replicas behind the real Envoy: whichever it picks knows what was registered at one."""

from pathlib import Path

import pytest

from loraplex import AsyncClient
from tests.e2e.test_envoy import Place, envoy_before, free_ports
from tests.service.control_plane import ControlPlane
from tests.service.fleet.test_replicas import Fleet, fleet, serves, until, upload

__all__ = ["fleet"]  # a fixture

pytestmark = pytest.mark.slow
NAMES = [f"pirate-{number}" for number in range(6)]


async def test_whichever_replica_is_picked_knows_what_was_registered_at_one(fleet: Fleet, tmp_path: Path) -> None:
    ports = free_ports(3)
    replicas = [await fleet.join(f"r{port}", health_listen=f"127.0.0.1:{port}") for port in ports]
    places = [Place(port_of(replica), health) for replica, health in zip(replicas, ports, strict=True)]
    with envoy_before(places, tmp_path) as envoy:
        await envoy.until_healthy({place.data for place in places})
        for number, name in enumerate(NAMES):
            adapter = await upload(replicas[number % 3], tmp_path, number, name)
            for replica in replicas:
                await until(serves(replica, adapter.version, name))
        async with AsyncClient(envoy.address) as client:
            for name in NAMES:
                for _ in range(5):
                    assert (await client.generate(name, "x", max_tokens=2)).outputs
        assert sum(count > 0 for count in envoy.counts("rq_success").values()) >= 2


def port_of(replica: ControlPlane) -> int:
    return int(replica.addresses.data.rpartition(":")[2])
