"""TLS for the HTTP port, with certificates that can be replaced while they are in use."""

import ssl

from loraplex_service.ports.config import TlsConfig
from loraplex_service.reloaded_files import ReloadedFiles


def server_context(tls: TlsConfig) -> ssl.SSLContext:
    """The context of the port. Each handshake uses the files as they are then; open connections stay.

    Raises OSError, ValueError for files that cannot be used at the start.
    """
    paths = [tls.certificate, tls.key, *([tls.client_ca] if tls.client_ca else [])]
    files = ReloadedFiles(paths, lambda: _read(tls))
    context = _read(tls)

    def use_latest(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        connection.context = files.get()

    context.sni_callback = use_latest  # called in every handshake, whether it names a server or not
    return context


def _read(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
