"""Routes and adapters name the form of what is asked of them, until a request names its own."""

from pathlib import Path

import pytest

from loraplex import InvalidArgument, constraint
from loraplex.v1.generation_pb2 import Constraint, GenerateSpec
from loraplex.v1.inference_pb2 import GenerateResponse
from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_engine.link.grammar import regex_grammar
from loraplex_engine.link.messages import AddRequest
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

ABC, DIGITS = constraint(regex="[abc]+"), constraint(regex="[0-9]+")


async def put_route(control: ControlPlane, target: str, form: Constraint | None) -> Route:
    route = Route(name="tenants/shared/routes/main", targets=[RouteTarget(model=target)], default_constraint=form)
    return await control.admin.update_route(route, allow_missing=True)


async def create(control: ControlPlane, form: Constraint | None, name: str = "pirate") -> str:
    source = write_adapter(control.roots / name).name
    made = await control.admin.create_adapter(
        name, base_model="tiny", source=source, default_constraint=form, wait=MOST_SECONDS
    )
    return made.version


async def grammar(
    control: ControlPlane, model: str, form: Constraint | None = None, num_beams: int | None = None
) -> tuple[str, str]:
    """The grammar that the engine is told, and who the caller is told has named it."""
    seen: list[AddRequest] = []
    core = control.core()
    add = core.add

    def noted(message: AddRequest) -> None:
        seen.append(message)
        add(message)

    core.add = noted  # type: ignore[method-assign]
    response: GenerateResponse = await control.client.generate(
        model, "abc", spec=GenerateSpec(constraint=form), max_tokens=3, num_beams=num_beams
    )
    core.add = add  # type: ignore[method-assign]
    return seen[0].grammar, response.target.constraint_source


async def test_a_route_names_the_form_of_what_asks_for_none(control: ControlPlane) -> None:
    made = await put_route(control, "models/tiny", ABC)
    assert made.default_constraint == ABC
    assert (await control.admin.get_route("main")).default_constraint == ABC
    assert await grammar(control, "main") == (regex_grammar("[abc]+"), made.name)
    assert await grammar(control, "models/tiny") == ("", "")
    resolved = await control.admin.resolve_target("main", tenant="shared")
    assert resolved.target.constraint_source == made.name


async def test_an_adapter_names_the_form_of_what_asks_for_none(control: ControlPlane) -> None:
    version = await create(control, ABC)
    assert (await control.admin.get_adapter("pirate")).default_constraint == ABC
    assert await grammar(control, "pirate") == (regex_grammar("[abc]+"), version)


async def test_what_has_no_outputs_follows_no_form(control: ControlPlane) -> None:
    version = await create(control, ABC)
    target = (await control.client.embed("pirate", ["abc"])).report.target
    assert (target.adapter_version, target.constraint_source) == (version, "")


async def test_a_request_names_its_own_form_or_none(control: ControlPlane) -> None:
    await create(control, ABC)
    assert await grammar(control, "pirate", DIGITS) == (regex_grammar("[0-9]+"), "")
    assert await grammar(control, "pirate", constraint(any_text=True)) == ("", "")


async def test_a_search_has_the_form_of_its_adapter(control: ControlPlane) -> None:
    version = await create(control, ABC)
    assert await grammar(control, "pirate", num_beams=2) == (regex_grammar("[abc]+"), version)


async def test_a_routes_form_comes_before_the_adapters(control: ControlPlane) -> None:
    version = await create(control, ABC)
    route = await put_route(control, "pirate", DIGITS)
    assert await grammar(control, "main") == (regex_grammar("[0-9]+"), route.name)
    await put_route(control, "pirate", None)
    assert await grammar(control, "main") == (regex_grammar("[abc]+"), version)
    await put_route(control, "pirate", constraint(any_text=True))
    assert await grammar(control, "main") == ("", route.name)


async def test_an_adapters_form_is_changed_and_removed(control: ControlPlane) -> None:
    version = await create(control, None)
    changed = await control.admin.update_adapter("pirate", default_constraint=DIGITS)
    assert changed.default_constraint == DIGITS
    assert await grammar(control, "pirate") == (regex_grammar("[0-9]+"), version)
    kept = await control.admin.update_adapter("pirate", labels={"a": "b"})
    assert kept.default_constraint == DIGITS
    removed = await control.admin.update_adapter("pirate", default_constraint=Constraint())
    assert not removed.HasField("default_constraint")
    assert await grammar(control, "pirate") == ("", "")


async def test_a_form_that_cannot_be_kept_to_is_refused_where_it_is_set(control: ControlPlane) -> None:
    bad = constraint(grammar="root ::= root")
    await create(control, None)
    for attempt, path in (
        (create(control, bad, "other"), "adapter.default_constraint.grammar"),
        (control.admin.update_adapter("pirate", default_constraint=bad), "adapter.default_constraint.grammar"),
        (put_route(control, "pirate", bad), "route.default_constraint.grammar"),
    ):
        with pytest.raises(InvalidArgument) as raised:
            await attempt
        assert [violation.field for violation in raised.value.violations] == [path]


async def test_default_forms_outlive_a_restart(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    async with control_plane(byte_tokenizer_directory, tmp_path, state_directory=state) as control:
        await create(control, ABC)
        await put_route(control, "pirate", DIGITS)
    async with control_plane(byte_tokenizer_directory, tmp_path, state_directory=state) as control:
        assert (await control.admin.get_adapter("pirate")).default_constraint == ABC
        assert (await control.admin.get_route("main")).default_constraint == DIGITS
