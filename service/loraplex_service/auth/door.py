"""Turn the credentials of a call into a principal."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from urllib.parse import unquote

from loraplex_adapters.grammar import ID_RULE, is_id
from loraplex_service.auth.access import check_role
from loraplex_service.auth.certificates import certificate_names
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.jwt import JwtVerifier
from loraplex_service.auth.keys import KeyVerifier
from loraplex_service.auth.principal import Principal, Role
from loraplex_service.errors import PermissionDenied, Unauthenticated

DEFAULT_TENANT = "default"
LOOPBACK = ("127.0.0.0/8", "::1/128")
_HOW = "send a bearer token in the metadata `authorization`"


@dataclass(frozen=True, slots=True)
class Caller:
    """The metadata, peer and certificate of a call."""

    metadata: Mapping[str, str]
    peer: str = ""  # as gRPC writes it: "ipv4:127.0.0.1:50000", "ipv6:%5B::1%5D:50000", "unix:"
    certificate: bytes | None = None  # the client's certificate in PEM, which gRPC has verified

    @property
    def host(self) -> str:
        """The peer's address without its port; "": the peer has none (a Unix socket)."""
        return unquote(self.peer).partition(":")[2].rpartition(":")[0].strip("[]").partition("%")[0]


class Door:
    """Authenticates calls and checks their role. For one event loop."""

    def __init__(self, config: AuthConfig | None = None) -> None:
        """`config`: None: authentication is off, and callers on this machine may name the tenant that they act for.

        Raises ValueError, OSError for files that cannot be used.
        """
        self._open = config is None
        config = config or AuthConfig(trusted_peers=LOOPBACK)
        self._keys = KeyVerifier(config.keys) if config.keys else None
        self._jwt = JwtVerifier(config.jwt) if config.jwt else None
        self._certificates = {
            entry.name: Principal(entry.name, entry.tenant, frozenset(entry.roles)) for entry in config.certificates
        }
        self._name_kinds = frozenset(config.certificate_names)
        self._trusted = [ip_network(network) for network in config.trusted_peers]

    async def enter(self, method: str, caller: Caller) -> Principal:
        """Authenticate the caller, check its role for this method and choose its tenant.

        Raises Unauthenticated, PermissionDenied, and Unavailable if a token cannot be checked now.
        """
        principal = await self._credential(caller)
        if principal is not None:
            may_name_others = principal.has(Role.ADMIN)
        else:
            principal, may_name_others = self._stranger(caller)
        principal = replace(principal, tenant=_tenant(principal, caller, may_name_others))
        check_role(principal, method)
        return principal

    async def _credential(self, caller: Caller) -> Principal | None:
        """The principal that the call's credentials stand for; None: it has none."""
        authorization = caller.metadata.get("authorization")
        if authorization is not None and not self._open:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer" or not token:
                raise Unauthenticated(f"the metadata `authorization` holds no bearer token; {_HOW}")
            return await self._verify(token)
        return None if caller.certificate is None else self._owner(caller.certificate)

    def _owner(self, certificate: bytes) -> Principal | None:
        """The owner of the certificate, by its first known name; None: no name is known. Raises Unauthenticated."""
        if not self._certificates:
            return None
        names = (name for kind, name in certificate_names(certificate) if kind in self._name_kinds)
        return next((self._certificates[name] for name in names if name in self._certificates), None)

    def _stranger(self, caller: Caller) -> tuple[Principal, bool]:
        """The principal of a call without credentials, and whether it may name a tenant. Raises Unauthenticated."""
        trusted = self._is_trusted(caller)
        if self._open:
            return Principal("anybody", DEFAULT_TENANT, frozenset((Role.ADMIN,))), trusted
        if trusted and "loraplex-tenant" in caller.metadata:
            return Principal("a trusted peer", DEFAULT_TENANT, frozenset((Role.INFERENCE,))), True
        raise Unauthenticated(f"this server requires credentials; {_HOW}")

    async def _verify(self, token: str) -> Principal:
        if self._keys is not None and self._keys.takes(token):
            return self._keys.verify(token)
        if self._jwt is not None:
            return await self._jwt.verify(token)
        raise Unauthenticated("this server does not know the bearer token")

    def _is_trusted(self, caller: Caller) -> bool:
        if caller.peer.startswith("unix:"):
            return self._open
        try:
            address = ip_address(caller.host)
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._trusted)


def _tenant(principal: Principal, caller: Caller, may_name_others: bool) -> str:
    """The tenant that the call acts for. Only callers with the right to do so may name another than their own."""
    named = caller.metadata.get("loraplex-tenant")
    if named is None or named == principal.tenant:
        return principal.tenant
    if not is_id(named):
        raise Unauthenticated(f"metadata loraplex-tenant: {named[:80]!r} is not a tenant id: {ID_RULE}")
    if not may_name_others:
        raise PermissionDenied(f"{principal.name!r} may not act for tenant {named!r}")
    return named
