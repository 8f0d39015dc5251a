"""TLS for the listeners, with certificates that can be replaced while they are in use."""

import ssl
import threading
from pathlib import Path

import grpc
from cryptography import x509

from loraplex_service.ports.config import TlsConfig
from loraplex_service.reloaded_files import ReloadedFiles


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """The credentials of one port. Each handshake uses the files as they are then; open connections stay.

    If a new certificate and key do not match, that is logged and the old pair stays. Raises OSError, ValueError for
    files that cannot be used at the start.
    """
    paths = [tls.certificate, tls.key, *([tls.client_ca] if tls.client_ca else [])]
    files = ReloadedFiles(paths, lambda: _read(tls))
    lock = threading.Lock()
    used = files.get()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """The new pair; None: unchanged. gRPC calls this from threads of its own."""
        nonlocal used
        with lock:
            latest = files.get()
            if latest is used:
                return None
            used = latest
            return latest

    return grpc.dynamic_ssl_server_credentials(
        used,
        fetch,  # type: ignore[arg-type]  # gRPC documents None; its annotations do not
        require_client_authentication=tls.client_ca is not None,
    )


def _read(tls: TlsConfig) -> grpc.ServerCertificateConfiguration:
    pair = (Path(tls.key).read_bytes(), Path(tls.certificate).read_bytes())
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key)  # they fit together
    except ssl.SSLError as error:
        raise ValueError(f"{tls.certificate} and {tls.key}: {error}") from error
    return grpc.ssl_server_certificate_configuration([pair], _authorities(tls.client_ca))


def _authorities(file: str | None) -> bytes | None:
    """The certificates in a file.

    Raises OSError, and ValueError if there are none, which would lock all callers out.
    """
    if file is None:
        return None
    content = Path(file).read_bytes()
    try:
        x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ValueError(f"client_ca: {file} holds no certificates in PEM: {error}") from error
    return content
