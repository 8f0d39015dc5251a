"""What a router can tell of a request."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_service.picker.asked import MAX_NAME, Asked, Wanted, headers_of, model_of, wanted
from loraplex_service.picker.envoy import ProcessingRequest


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("legal", [Wanted(None, "legal")]),
        ("legal@0123456789ab", [Wanted(None, "legal")]),
        ("tenants/acme/adapters/legal", [Wanted("acme", "legal")]),
        ("tenants/acme/adapters/legal@0123456789ab", [Wanted("acme", "legal")]),
        ("a*0.7 + tenants/acme/adapters/b*0.3", [Wanted(None, "a"), Wanted("acme", "b")]),
        ("a*0.7+a*0.1", [Wanted(None, "a")]),
        ("models/llama", []),
        ("", []),
        ("../../etc/passwd", []),
    ],
)
def test_names_are_read_as_the_server_reads_them(name: str, adapters: list[Wanted]) -> None:
    assert list(wanted(name, None)) == adapters


def test_a_bare_name_is_of_the_tenant_that_the_headers_name() -> None:
    asked = Asked.from_headers({"loraplex-adapter": "legal", "loraplex-tenant": "acme"})
    assert asked.adapters == (Wanted("acme", "legal"),)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "legal", "messages": []}', "legal"),
        (b'{"messages": [{"content": "say \\"model\\": \\"no\\""}], "model" :\n"legal"}', "legal"),
        (b'{"model": "legal", "messages": [{"content": "cut o', "legal"),
        (b'{"model": "caf\\u00e9"}', "caf\u00e9"),
        (b'{"model": 7}', ""),
        (b'{"model": "\\x"}', ""),
        (b"", ""),
    ],
)
def test_the_model_is_found_in_a_body_that_may_have_been_cut(body: bytes, name: str) -> None:
    assert model_of(body) == name


@given(st.text(max_size=40).filter(lambda name: '"model"' not in name))
def test_any_model_is_read_as_json_means_it(name: str) -> None:
    assert model_of(json.dumps({"prompt": "x", "model": name}).encode()) == name


@given(st.binary(max_size=200))
def test_no_body_is_too_strange(body: bytes) -> None:
    model_of(body)
    model_of(b'{"model": "' + body)


@given(st.text(max_size=200), st.none() | st.text(max_size=20))
def test_no_name_is_too_strange(name: str, tenant: str | None) -> None:
    assert len(wanted(name, tenant)) <= 8


@pytest.mark.parametrize("piece", [b'"model"', b'"model":', b'"model" : "', b'"model":"\\', b"\\", b'"'])
def test_a_body_that_is_made_to_be_hard_is_read_in_time(piece: bytes) -> None:
    body = (piece + b" " * 200) * 1200  # a quarter of a MiB
    before = time.thread_time()
    model_of(body)
    assert time.thread_time() - before < 2


def test_a_header_beyond_the_limit_counts_as_empty_and_the_first_of_a_name_counts() -> None:
    request = ProcessingRequest()
    headers = request.request_headers.headers.headers
    headers.add(key="loraplex-tenant", raw_value=b"x" * (MAX_NAME + 1))
    headers.add(key="loraplex-adapter", raw_value=b"legal")
    headers.add(key="loraplex-adapter", raw_value=b"other")
    headers.add(key="cookie", raw_value=b"secret")
    assert headers_of(headers) == {"loraplex-tenant": "", "loraplex-adapter": "legal"}
