"""Who is let in: keys, tokens of a provider, certificates, peers."""

import time
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import jwt
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from loraplex_service.auth.config import AuthConfig, CertificateConfig, JwtConfig, NameKind
from loraplex_service.auth.door import Caller, Door
from loraplex_service.auth.keys import KeyFile, KeyVerifier, make_key, read_keys, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.cli import main
from loraplex_service.errors import PermissionDenied, Unauthenticated
from tests.service.auth.provider import Provider
from tests.service.authority import Authority

GENERATE = "/loraplex.v1.InferenceService/Generate"
LOAD_MODEL = "/loraplex.v1.ModelService/LoadModel"
HERE, ELSEWHERE = "ipv4:127.0.0.1:5000", "ipv4:10.1.2.3:5000"


def bearer(token: str, **metadata: str) -> Caller:
    return Caller({"authorization": f"Bearer {token}", **metadata}, ELSEWHERE)


def showing(name: str, *alternatives: x509.GeneralName) -> Caller:
    """With a certificate for these names."""
    return Caller({}, ELSEWHERE, Authority("a").issue(name, *alternatives).certificate)


async def tenant_of(door: Door, caller: Caller, method: str = GENERATE) -> str:
    return (await door.enter(method, caller)).tenant


# ---- an open door ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", [HERE, "ipv6:%5B::1%5D:5000", "ipv6:[::1]:5000", "ipv4:127.9.9.9:1", "unix:"])
async def test_without_auth_a_peer_on_this_machine_names_its_tenant(peer: str) -> None:
    assert await tenant_of(Door(), Caller({"loraplex-tenant": "acme"}, peer)) == "acme"


@pytest.mark.parametrize("peer", [ELSEWHERE, "ipv6:%5B::ffff:10.1.2.3%5D:5000", "", "ipv4:127.0.0.1.evil:1"])
async def test_without_auth_nobody_else_does(peer: str) -> None:
    assert await tenant_of(Door(), Caller({}, peer)) == "default"
    with pytest.raises(PermissionDenied):
        await tenant_of(Door(), Caller({"loraplex-tenant": "acme"}, peer))


async def test_a_method_that_is_not_in_the_table_is_open_to_nobody() -> None:
    with pytest.raises(PermissionDenied, match="lets no caller use"):
        await Door().enter("/loraplex.v1.InferenceService/Secret", Caller({}, HERE))


# ---- peers -----------------------------------------------------------------------------------------------------------


async def test_a_trusted_peer_names_the_tenant_and_gets_no_further_than_inference() -> None:
    door = Door(AuthConfig(trusted_peers=("10.0.0.0/8",)))
    caller = Caller({"loraplex-tenant": "acme"}, ELSEWHERE)
    assert await tenant_of(door, caller) == "acme"
    with pytest.raises(PermissionDenied):
        await door.enter(LOAD_MODEL, caller)
    for stranger in (Caller({"loraplex-tenant": "acme"}, HERE), Caller({}, ELSEWHERE)):
        with pytest.raises(Unauthenticated):
            await door.enter(GENERATE, stranger)


async def test_a_token_is_not_worth_more_through_a_trusted_peer(tmp_path: Path) -> None:
    token, key = make_key("acme", [Role.INFERENCE], None)
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(key,)))
    door = Door(AuthConfig(keys=str(tmp_path / "keys.yaml"), trusted_peers=("10.0.0.0/8",)))
    with pytest.raises(PermissionDenied):
        await door.enter(GENERATE, bearer(token, **{"loraplex-tenant": "rival"}))
    with pytest.raises(Unauthenticated):
        await door.enter(GENERATE, bearer("lpx_wrong", **{"loraplex-tenant": "rival"}))


# ---- certificates ----------------------------------------------------------------------------------------------------


async def test_a_certificate_is_known_by_any_of_its_names() -> None:
    entry = CertificateConfig(name="support.acme", tenant="acme")
    door = Door(AuthConfig(certificates=(entry,)))
    assert await tenant_of(door, showing("x", x509.DNSName("y"), x509.DNSName("support.acme"))) == "acme"
    assert await tenant_of(door, showing("support.acme", x509.DNSName("y"))) == "acme"
    with pytest.raises(Unauthenticated):
        await door.enter(GENERATE, showing("support.acme.evil"))


@pytest.mark.parametrize(
    "names",
    [
        ("operator\0.evil",),
        ("x", x509.DNSName("operator\0.evil")),
        ("operator", x509.DNSName("x\0")),
        ("operator", x509.UniformResourceIdentifier("x\0")),
        ("operator\n",),
    ],
    ids=str,
)
async def test_a_certificate_with_a_control_character_in_a_name_is_nobodys(names: tuple[Any, ...]) -> None:
    door = Door(AuthConfig(certificates=(CertificateConfig(name="operator", tenant="operator"),)))
    with pytest.raises(Unauthenticated, match="control character"):
        await door.enter(GENERATE, showing(*names))


ALTERNATIVES: dict[NameKind, tuple[str, x509.GeneralName]] = {
    NameKind.DNS: ("shop.acme", x509.DNSName("shop.acme")),
    NameKind.URI: ("spiffe://acme/shop", x509.UniformResourceIdentifier("spiffe://acme/shop")),
    NameKind.EMAIL: ("shop@acme", x509.RFC822Name("shop@acme")),
    NameKind.IP: ("10.0.0.1", x509.IPAddress(IPv4Address("10.0.0.1"))),
}


@pytest.mark.parametrize("kind", ALTERNATIVES)
async def test_the_kinds_of_names_that_count_are_configured(kind: NameKind) -> None:
    name, alternative = ALTERNATIVES[kind]
    entry = CertificateConfig(name=name, tenant="acme")
    caller = showing("x", alternative)
    assert await tenant_of(Door(AuthConfig(certificates=(entry,), certificate_names=(kind,))), caller) == "acme"
    others = tuple(other for other in NameKind if other is not kind)
    with pytest.raises(Unauthenticated):
        await tenant_of(Door(AuthConfig(certificates=(entry,), certificate_names=others)), caller)


@pytest.mark.parametrize("kind", [NameKind.URI, NameKind.EMAIL, NameKind.IP])
async def test_by_itself_no_alternative_name_counts_but_that_of_a_host(kind: NameKind) -> None:
    name, alternative = ALTERNATIVES[kind]
    door = Door(AuthConfig(certificates=(CertificateConfig(name=name, tenant="acme"),)))
    with pytest.raises(Unauthenticated):
        await tenant_of(door, showing("x", alternative))


@pytest.mark.parametrize("certificate", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
async def test_a_certificate_that_cannot_be_read_is_nobodys(certificate: bytes) -> None:
    door = Door(AuthConfig(certificates=(CertificateConfig(name="operator", tenant="operator"),)))
    with pytest.raises(Unauthenticated, match="cannot be read"):
        await door.enter(GENERATE, Caller({}, ELSEWHERE, certificate))


async def test_a_certificate_with_two_common_names_is_nobodys() -> None:
    entry = CertificateConfig(name="operator", tenant="operator")
    door = Door(AuthConfig(certificates=(entry,)))
    certificate = Authority("a").issue("x", more=("operator",)).certificate
    with pytest.raises(Unauthenticated, match="several common names"):
        await door.enter(GENERATE, Caller({}, ELSEWHERE, certificate))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (AuthConfig(certificates=(CertificateConfig(name="a\0", tenant="t"),)), "control character"),
        (AuthConfig(certificates=(CertificateConfig(name="", tenant="t"),)), "is empty"),
        (AuthConfig(certificates=(CertificateConfig(name="a", tenant="t"),) * 2), "appears 2 times"),
        (
            AuthConfig(certificates=(CertificateConfig(name="a", tenant="t"),), certificate_names=()),
            "the list is empty",
        ),
    ],
)
def test_certificates_that_could_not_tell_who_calls_are_not_configured(config: AuthConfig, problem: str) -> None:
    assert [found for found in config.problems() if problem in found]


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_the_file_does_not_hold_the_token(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    token, key = make_key("acme", [Role.INFERENCE], None)
    write_keys(file, KeyFile(keys=(key,)))
    assert token.split("_", 2)[2] not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert KeyVerifier(str(file)).verify(token).tenant == "acme"


@pytest.mark.parametrize("hash_of_none", ["0" * 64, ""])
def test_an_unknown_id_matches_nothing(tmp_path: Path, hash_of_none: str) -> None:
    write_keys(tmp_path / "keys.yaml", KeyFile())
    with pytest.raises(Unauthenticated):
        KeyVerifier(str(tmp_path / "keys.yaml")).verify(f"lpx_x_{hash_of_none}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keys: [{id: a}]", "missing required field"),
        ("keys: [{id: a, sha256: b, tenant: A, roles: [admin]}]", "tenant 'A'"),
        ("keys: [{id: a, sha256: b, tenant: t, roles: [root]}]", "root"),
        ("keys: [{id: a, sha256: b, tenant: t, roles: []}, {id: a, sha256: b, tenant: t, roles: []}]", "twice"),
        ("keys: [{id: a, sha256: b, tenant: t, roles: [], expires: '2027-01-01T00:00:00'}]", "time zone"),
        ("keys: [", "keys.yaml"),
        ("", "it is empty"),
        ("# nobody", "it is empty"),
    ],
)
def test_what_is_wrong_with_a_key_file_is_said(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_keys(tmp_path / "keys.yaml")


def test_a_file_that_is_emptied_shuts_nobody_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.yaml"
    token, key = make_key("acme", [Role.INFERENCE], None)
    write_keys(file, KeyFile(keys=(key,)))
    verifier = KeyVerifier(str(file))
    file.write_text("")
    assert verifier.verify(token).tenant == "acme"
    assert "the earlier content stays in force" in caplog.text


def test_the_last_key_can_be_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    token, key = make_key("acme", [Role.INFERENCE], None)
    write_keys(file, KeyFile(keys=(key,)))
    verifier = KeyVerifier(str(file))
    write_keys(file, KeyFile())
    with pytest.raises(Unauthenticated):
        verifier.verify(token)


def test_keys_are_made_listed_and_revoked_on_the_command_line(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["keys", *arguments, "--file", file])
        assert result.exit_code == 0, result.output
        return result.output.strip()

    first = run("create", "--tenant", "acme", "--comment", "the web shop")
    second = run("create", "--tenant", "operator", "--role", "admin", "--days", "30")
    verifier = KeyVerifier(file)
    assert verifier.verify(first).roles == {Role.INFERENCE}
    assert verifier.verify(second).roles == {Role.ADMIN}
    listed = run("list").splitlines()
    assert "acme  inference  for ever  the web shop" in listed[0]
    assert "operator  admin  until " in listed[1]
    run("revoke", first.split("_")[1])
    assert len(run("list").splitlines()) == 1
    with pytest.raises(Unauthenticated):
        verifier.verify(first)


# ---- tokens of a provider --------------------------------------------------------------------------------------------


@pytest.fixture
def provider(tmp_path: Path) -> Provider:
    return Provider(tmp_path / "jwks.json")


async def test_a_token_of_the_provider_names_tenant_and_roles(provider: Provider) -> None:
    door = Door(AuthConfig(jwt=provider.config))
    principal = await door.enter(GENERATE, bearer(provider.token()))
    assert (principal.name, principal.tenant, principal.roles) == ("joe", "acme", {Role.INFERENCE})
    admin = await door.enter(LOAD_MODEL, bearer(provider.token(roles=["admin", "baker"])))
    assert admin.roles == {Role.ADMIN}
    with pytest.raises(PermissionDenied):
        await door.enter(GENERATE, bearer(provider.token(roles=["baker"])))


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": 1},
        {"exp": None},
        {"aud": "other"},
        {"aud": None},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"tenant": None},
        {"tenant": "../acme"},
        {"tenant": 7},
        {"roles": "admin"},
        {"nbf": 4000000000},
        {"exp": "1795253612"},
        {"exp": "tomorrow"},
        {"exp": True},
        {"exp": [4000000000]},
        {"exp": {"at": 4000000000}},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"nbf": "0"},
        {"nbf": float("-inf")},
        {"iat": {}},
        {"aud": {"loraplex": 1}},
        {"aud": [7, "loraplex"]},
        {"roles": {"admin": 1}},
        {"tenant": ["acme"]},
    ],
    ids=str,
)
async def test_a_token_with_a_claim_that_is_wrong_is_refused(provider: Provider, claims: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        await Door(AuthConfig(jwt=provider.config)).enter(GENERATE, bearer(provider.token(**claims)))


async def test_a_token_that_the_provider_did_not_sign_is_refused(provider: Provider) -> None:
    door = Door(AuthConfig(jwt=provider.config))
    stranger = ec.generate_private_key(ec.SECP256R1())
    unsigned = jwt.encode({"tenant": "acme"}, "", "none")
    # A symmetric signature, with a secret that everybody knows: the attack that an allow-list of algorithms is for.
    symmetric = provider.token(key=provider.file.read_bytes().hex(), algorithm="HS256")
    for token in (provider.token(key=stranger), unsigned, symmetric, provider.token()[:-4], "a.b.c", "x", "ü.é.x"):
        with pytest.raises(Unauthenticated):
            await door.enter(GENERATE, bearer(token))


async def test_the_providers_keys_may_change(provider: Provider) -> None:
    door = Door(AuthConfig(jwt=provider.config))
    await door.enter(GENERATE, bearer(provider.token()))
    provider.rotate("k2")
    await door.enter(GENERATE, bearer(provider.token()))


async def test_a_token_that_was_good_is_refused_once_it_has_expired(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(AuthConfig(jwt=provider.config))
    token = provider.token(exp=int(time.time()) + 5)
    await door.enter(GENERATE, bearer(token))
    later = time.time() + 6
    monkeypatch.setattr("loraplex_service.auth.jwt.time.time", lambda: later)
    monkeypatch.setattr("jwt.api_jwt.datetime", _Clock(later))
    with pytest.raises(Unauthenticated, match="expired"):
        await door.enter(GENERATE, bearer(token))


class _Clock:
    """datetime, at a moment of the test's choice."""

    def __init__(self, seconds: float) -> None:
        self._now = datetime.fromtimestamp(seconds, UTC)

    def now(self, tz: Any = None) -> datetime:
        return self._now + timedelta(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(datetime, name)


@pytest.mark.parametrize("algorithm", ["HS256", "none"])
def test_algorithms_that_need_a_secret_cannot_be_configured(provider: Provider, algorithm: str) -> None:
    config = AuthConfig(jwt=JwtConfig(issuer="i", audience="a", jwks=str(provider.file), algorithms=(algorithm,)))
    assert any(f"{algorithm!r} is not one of" in problem for problem in config.problems())
