"""The OpenAPI document says what the tables do, and the page what the document says."""

import re
from functools import cache
from typing import Any

import pytest

from loraplex_service.http import openapi
from loraplex_service.http.dialects import TABLES
from loraplex_service.http.door import MODEL
from loraplex_service.http.parameters import Parameter, Table
from tests.service.http.caller import Caller
from tests.service.http.test_tables import EACH, REFUSED, body_for

jsonschema = pytest.importorskip("jsonschema")
ANSWERED = [table for table in TABLES if "adapter" not in table.path]  # by a door without http_admin
SAID = [{"role": "user", "content": "x"}]
CASES = [pytest.param(*each, id=f"{each[0].path} {each[1].name}") for each in EACH if each[1].taken]


@cache
def validator_at(path: str) -> Any:
    [table] = (table for table in TABLES if table.path == path)
    schema = openapi.body_schema(table)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def validator_of(table: Table) -> Any:
    return validator_at(table.path)


@pytest.mark.parametrize(("table", "parameter"), CASES)
def test_what_a_table_takes_is_valid(table: Table, parameter: Parameter) -> None:
    validator = validator_of(table)
    validator.validate(body_for(table, parameter))
    validator.validate({parameter.name: None})


@pytest.mark.parametrize(("table", "parameter"), REFUSED)
def test_what_a_table_refuses_is_not(table: Table, parameter: Parameter) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator_of(table).validate({parameter.name: "something"})


@pytest.mark.parametrize(
    "wrong",
    [{"temprature": 1}, {"temperature": 11}, {"top_p": 0}, {"top_p": "1"}, {"stop": ["a"] * 17}, {"model": "a" * 513}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_limits_of_the_contract_are_limits_of_the_document(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator_of(TABLES[0]).validate(wrong)


async def test_the_document_has_every_endpoint_and_no_other(caller: Caller) -> None:
    told = (await caller.get("/openapi.json")).json["paths"]
    methods = {path.replace("{name}", ""): next(iter(calls)).upper() for path, calls in told.items()}
    assert methods[MODEL] == "GET"
    there_is = {**caller.door._endpoints, **caller.door._below}
    assert methods == {path: endpoint.method for path, endpoint in there_is.items()}


@pytest.mark.parametrize("table", TABLES, ids=[table.path for table in TABLES])
async def test_what_a_body_cannot_do_without_is_required(caller: Caller, table: Table) -> None:
    call = (await caller.get("/openapi.json")).json["paths"][table.path]["post"]
    schema = call["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["required"]) == set(table.needs) <= schema["properties"].keys()


@pytest.mark.parametrize("table", ANSWERED, ids=[table.path for table in ANSWERED])
async def test_a_body_without_what_it_needs_is_refused(caller: Caller, table: Table) -> None:
    given = {"model": "tiny", "messages": SAID, "input": "x", "prompt": "x", "tokens": [1]}
    body = {name: given[name] for name in table.needs}
    for name in table.needs:
        answer = await caller.post(table.path, {**body, name: None})
        assert (answer.status, answer.error["param"]) == (400, name)


async def test_every_call_has_a_name_of_its_own(caller: Caller) -> None:
    paths = (await caller.get("/openapi.json")).json["paths"]
    names = [call["operationId"] for calls in paths.values() for call in calls.values()]
    assert len(set(names)) == len(names) == len(paths)
    assert "503" in paths["/health"]["get"]["responses"]


async def test_the_page_shows_every_parameter_and_needs_no_network(caller: Caller) -> None:
    answer = await caller.get("/docs")
    page = answer.body.decode()
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"<script|<link|<img|@import|(src|href)=\W*(\w+:)?//", page)
    for table in TABLES:
        shown = page.partition(f"<h2><code>POST {table.path}</code></h2>")[2].partition("<h2>")[0]
        names = re.findall(r"<tr><td><code>([^<]*)</code>", shown)
        assert names == [parameter.name for parameter in table.parameters]


def test_what_a_note_says_is_text_on_the_page() -> None:
    assert openapi._shown('<b> `{"a": 1}`') == "&lt;b&gt; <code>{&quot;a&quot;: 1}</code>"
