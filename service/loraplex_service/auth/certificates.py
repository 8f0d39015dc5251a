"""Read the names in a client certificate.

gRPC passes the names on as text without their kind, and the text may hold a NUL. So the names are read from
the certificate itself, which gRPC has verified.
"""

from collections.abc import Iterator
from functools import lru_cache

from cryptography import x509
from cryptography.x509.oid import NameOID

from loraplex_service.auth.config import NameKind
from loraplex_service.errors import Unauthenticated

REMEMBERED_CERTIFICATES = 1024


@lru_cache(REMEMBERED_CERTIFICATES)
def certificate_names(certificate: bytes) -> tuple[tuple[NameKind, str], ...]:
    """All names in a certificate in PEM, each with its kind: alternative names first.

    Raises Unauthenticated for a certificate whose names cannot be relied on.
    """
    try:
        names = tuple(_read_names(x509.load_pem_x509_certificate(certificate)))
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise Unauthenticated(f"the names in the client certificate cannot be read: {error}") from None
    for kind, name in names:
        if not name.isprintable():
            raise Unauthenticated(f"the client certificate has a {kind} name with a control character: {name[:80]!r}")
    return names


def _read_names(certificate: x509.Certificate) -> Iterator[tuple[NameKind, str]]:
    """Read the names. Raises ValueError, and the errors of cryptography for a certificate that it cannot read."""
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        alternatives = x509.SubjectAlternativeName([])
    yield from ((NameKind.DNS, name) for name in alternatives.get_values_for_type(x509.DNSName))
    yield from ((NameKind.URI, name) for name in alternatives.get_values_for_type(x509.UniformResourceIdentifier))
    yield from ((NameKind.EMAIL, name) for name in alternatives.get_values_for_type(x509.RFC822Name))
    yield from ((NameKind.IP, str(name)) for name in alternatives.get_values_for_type(x509.IPAddress))
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(common) > 1:
        raise ValueError("it has several common names")
    yield from ((NameKind.COMMON_NAME, str(attribute.value)) for attribute in common)
