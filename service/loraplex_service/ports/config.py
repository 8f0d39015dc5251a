"""The part of the configuration that says how the ports are encrypted, and the dialects that there are."""

import msgspec

DIALECTS = ("kserve_v2", "vllm", "openengine")  # what the data port may speak beside the contract


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files in PEM. With `client_ca`, callers must show a certificate that it signed."""

    certificate: str
    key: str
    client_ca: str | None = None
