"""Makes a server one replica of a fleet: what it has instead of the parts of a server on its own."""

import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from loraplex_adapters.shared_registry import SharedAdapterRegistry
from loraplex_service.adapters.background import BackgroundWork
from loraplex_service.adapters.library import AdapterLibrary, Gathering
from loraplex_service.adapters.shared_files import SharedFiles
from loraplex_service.adapters.shared_records import SharedRecords
from loraplex_service.config import ServiceConfig
from loraplex_service.control.uploads import receive_files
from loraplex_service.errors import Unavailable
from loraplex_service.fleet.database import Database
from loraplex_service.fleet.leases import Leases
from loraplex_service.fleet.peers import PeerFiles, Way, fetched
from loraplex_service.fleet.state import FleetState
from loraplex_service.ports.config import TlsConfig
from loraplex_service.ports.tls import server_credentials
from loraplex_service.state import StateFile


class Replica:
    """The parts of one replica."""

    def __init__(self, config: ServiceConfig, dsn: str, local: StateFile) -> None:
        """`local`: its own file. Raises OSError for a connection string that is none."""
        name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        try:
            self.state = FleetState(local, lambda listens: Database(dsn, name, listens))
        except ValueError as error:
            raise OSError(f"state: {error}") from error
        self.leases = Leases(self.state.settle, lambda: self.state.figures.peers + 1)
        self.registry = SharedAdapterRegistry()
        self._config = config

    def records(self, work: BackgroundWork) -> SharedRecords:
        """The records that all replicas share."""
        return SharedRecords(self.registry, self.state, work)

    def files(self, library: AdapterLibrary) -> SharedFiles:
        """The files that any replica has."""
        return SharedFiles(self.registry, library, self.state.peers, self._fetch)

    @asynccontextmanager
    async def listening(self, library: AdapterLibrary) -> AsyncIterator[None]:
        """Have others fetch files from here, if that is configured. Raises RuntimeError if the address is taken."""
        listen = self._config.fleet_listen
        if listen is None:
            yield
            return
        tls = self._config.tls
        files = PeerFiles(lambda: self.state.secret, lambda digest: self._directory(library, digest))
        server, port = files.server(listen, None if tls is None else server_credentials(tls))
        self.state.address = self._config.fleet_address or f"{listen.rpartition(':')[0]}:{port}"
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)

    def _directory(self, library: AdapterLibrary, digest: str) -> Path | None:
        versions = self.registry.list_versions(include_versions=True)
        noted = (library.directory(version) for version in versions if version.key.digest == digest)
        return next(filter(Path.is_dir, (*noted, library.copy(digest))), None)

    async def _fetch(self, address: str, digest: str, gathering: Gathering) -> None:
        way = Way() if self._config.tls is None else _encrypted(self._config.tls, self._config)
        async with fetched(address, digest, self.state.secret, way) as messages:
            await receive_files(messages, gathering, self._config.limits.upload_bytes, lambda size: None)


def _encrypted(tls: TlsConfig, config: ServiceConfig) -> Way:
    """Replicas show each other their certificates, and check them against fleet_ca or client_ca, or else as the system
    does.

    Raises Unavailable for files that cannot be read.
    """
    authorities = config.fleet_ca or tls.client_ca
    try:
        root = None if authorities is None else Path(authorities).read_bytes()
        pair = Path(tls.key).read_bytes(), Path(tls.certificate).read_bytes()
    except OSError as error:
        raise Unavailable("ADAPTER_UNREADABLE", f"the files of tls cannot be read: {error}") from error
    return Way(grpc.ssl_channel_credentials(root, *pair), config.fleet_server_name)
