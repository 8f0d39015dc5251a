"""The part of the configuration that says who may call."""

from collections.abc import Callable, Iterator
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path
from typing import ClassVar

import msgspec

from loraplex_adapters.grammar import ID_RULE, is_id
from loraplex_engine.link.bounds import choice_problems
from loraplex_service.auth.principal import Role

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")


class JwtConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens of an identity provider, with asymmetric signatures only: the server holds nothing that could sign."""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"algorithms": ALGORITHMS}

    issuer: str  # `iss` of the tokens
    audience: str  # one of `aud` of the tokens
    jwks: str  # a file with the provider's public keys, or an https address
    jwks_ca: str | None = None  # a PEM file of authorities for that address. Left out: the system's
    algorithms: tuple[str, ...] = ("RS256", "ES256")  # of the signatures
    tenant_claim: str = "tenant"  # the claim that names the tenant
    roles_claim: str = "roles"  # the claim with a list of roles; a token without it has the role `inference`
    leeway_seconds: float = 30.0  # tolerated difference between the clocks

    @property
    def is_remote(self) -> bool:
        return self.jwks.startswith("https://")

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; empty: none is."""
        yield from (f"jwt.{problem}" for problem in choice_problems(self))
        if not self.algorithms:
            yield "jwt.algorithms: the list is empty; name at least one"
        if not self.is_remote and not Path(self.jwks).is_file():
            yield f"jwt.jwks: there is no file {self.jwks}, and it is not an https:// address"
        if self.jwks_ca is not None and not self.is_remote:
            yield "jwt.jwks_ca: is for a jwks with an https:// address"
        elif self.jwks_ca is not None and not Path(self.jwks_ca).is_file():
            yield f"jwt.jwks_ca: there is no file {self.jwks_ca}"

    def with_paths(self, absolute: Callable[[str], str]) -> "JwtConfig":
        """Return a copy with absolute paths."""
        jwks = self.jwks if self.is_remote else absolute(self.jwks)
        return msgspec.structs.replace(
            self, jwks=jwks, jwks_ca=None if self.jwks_ca is None else absolute(self.jwks_ca)
        )


class NameKind(StrEnum):
    """The place of a name in a certificate: a kind of alternative name, or the subject."""

    DNS = "dns"
    URI = "uri"
    EMAIL = "email"
    IP = "ip"
    COMMON_NAME = "common_name"


class CertificateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A name in client certificates, and the tenant and roles that it stands for."""

    name: str  # exactly as it stands in the certificate
    tenant: str  # for which its holder calls
    roles: tuple[Role, ...] = (Role.INFERENCE,)  # what its holder may do


class AuthConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The kinds of credentials that the server accepts; a caller needs one. Callers without any are refused."""

    # the file that `loraplex keys create` writes: hashes of bearer tokens, read again when it changes
    keys: str | None = None
    jwt: JwtConfig | None = None  # bearer tokens of an identity provider
    certificates: tuple[CertificateConfig, ...] = ()  # names in client certificates
    # which names of a certificate count: alternative names of these kinds, or the subject's
    certificate_names: tuple[NameKind, ...] = (NameKind.DNS, NameKind.COMMON_NAME)
    # networks whose calls without credentials act for the tenant that their metadata `loraplex-tenant` names
    trusted_peers: tuple[str, ...] = ()

    def with_paths(self, absolute: Callable[[str], str]) -> "AuthConfig":
        """Return a copy with absolute paths."""
        keys = None if self.keys is None else absolute(self.keys)
        jwt = None if self.jwt is None else self.jwt.with_paths(absolute)
        return msgspec.structs.replace(self, keys=keys, jwt=jwt)

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; empty: none is."""
        if not (self.keys or self.jwt or self.certificates or self.trusted_peers):
            yield "there is nothing that a caller could show: name keys, jwt, certificates or trusted_peers"
        if self.keys is not None and not Path(self.keys).is_file():
            yield f"keys: there is no file {self.keys}; make one with `loraplex keys create`"
        if self.jwt is not None:
            yield from self.jwt.problems()
        if self.certificates and not self.certificate_names:
            yield "certificate_names: the list is empty, so that no certificate can identify a caller"
        names = [certificate.name for certificate in self.certificates]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"certificates: {name!r} appears {names.count(name)} times; names must differ"
        for certificate in self.certificates:
            if not certificate.name.isprintable() or not certificate.name:
                yield f"certificates: name {certificate.name!r} is empty or has a control character"
            if not is_id(certificate.tenant):
                yield f"certificates: tenant {certificate.tenant!r} must be {ID_RULE}"
        for network in self.trusted_peers:
            try:
                ip_network(network)
            except ValueError as error:
                yield f"trusted_peers: {error}"
