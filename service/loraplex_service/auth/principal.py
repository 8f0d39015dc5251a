"""Principals: the authenticated callers."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """The rights of a caller. ADMIN may do everything, for every tenant."""

    INFERENCE = "inference"  # generate and tokenise, with the tenant's own adapters and the shared ones
    ADAPTERS = "adapters"  # manage the tenant's own adapters and routes; not read them from the server's directories
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller, and the tenant that it acts for."""

    name: str  # for logs: the id of the key, the subject of the token, the name in the certificate
    tenant: str
    roles: frozenset[Role]

    def has(self, role: Role) -> bool:
        return role in self.roles or Role.ADMIN in self.roles


ANYBODY = Principal("anybody", "", frozenset())  # the caller of a method that requires no credentials
