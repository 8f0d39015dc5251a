"""The configuration file: what it gives, and that every mistake in it is named with its place."""

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from loraplex.v1.generation_pb2 import Choices, Constraint, JsonObject
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig, DraftKind
from loraplex_service.config import ServiceConfig, load_config
from loraplex_service.config_checks import MAY_BE_ZERO, sections
from loraplex_service.config_file import ConfigError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A place with a model directory and an adapter directory, both empty."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "adapters" / "pirate").mkdir(parents=True)
    return tmp_path.resolve()


MODEL = """
models:
  - name: tiny
    model: models/tiny
"""


def load(directory: Path, text: str, **environment: str) -> ServiceConfig:
    file = directory / "loraplex.yaml"
    file.write_text(text)
    return load_config(file, environment)


def error_of(directory: Path, text: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load(directory, text, **environment)
    return str(raised.value)


def test_a_file_with_one_model_has_defaults_for_all_else(directory: Path) -> None:
    config = load(directory, MODEL)
    assert config.models[0].name == "tiny"
    assert (config.listen, config.admin_listen) == ("127.0.0.1:50051", "127.0.0.1:50052")
    assert config.adapters == ()


def test_relative_paths_are_relative_to_the_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    text = MODEL + "adapter_roots: [adapters]\nadapters: [{name: pirate, model: tiny, source: adapters/pirate}]"
    config = load(directory, text)
    assert config.models[0].model == str(directory / "models/tiny")
    assert config.adapter_roots == (str(directory / "adapters"),)
    assert config.adapters[0].source == str(directory / "adapters/pirate")


def test_the_source_of_an_adapter_is_looked_for_under_the_roots_and_then_beside_the_file(directory: Path) -> None:
    for path in ("own/asjson", "own/adapters", "adapters"):
        (directory / path).mkdir(parents=True, exist_ok=True)
    sources = {"asjson": "own/asjson", "../own/asjson": "own/../own/asjson", "own/asjson": "own/asjson"}
    sources |= {"adapters": "own/adapters", "absent": "absent"}
    for written, found in sources.items():
        config = load(
            directory, MODEL + f"adapter_roots: [own]\nadapters: [{{name: p, model: tiny, source: {written}}}]"
        )
        assert config.adapters[0].source == str(directory / found)


def test_the_small_model_of_drafts_is_found_as_models_are(directory: Path) -> None:
    for written, found in (("models/tiny", str(directory / "models/tiny")), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")):
        config = load(directory, MODEL + f"    drafts: {{kind: model, model: {written}}}")
        assert config.models[0].drafts == DraftConfig(kind=DraftKind.MODEL, model=found)


@pytest.mark.parametrize(
    ("drafts", "problem"),
    [
        ("{kind: model}", "drafts.model must name a directory or a hub id"),
        ("{kind: model, model: ./gone}", "drafts.model: there is no directory"),
        ("{kind: ngram, model: models/tiny}", "must be left out where drafts.kind is ngram"),
        ("{kind: ngram, tokens: 33}", "drafts.tokens 33 must be from 1 to 32"),
        ("{kind: magic}", "Invalid enum value 'magic'"),
    ],
)
def test_drafts_that_make_no_sense_are_reported(directory: Path, drafts: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(directory, MODEL + f"    drafts: {drafts}")


def test_a_model_that_is_no_directory_is_the_id_of_a_hub(directory: Path) -> None:
    config = load(directory, "models: [{name: qwen, model: Qwen/Qwen3-0.6B}]")
    assert config.models[0].model == "Qwen/Qwen3-0.6B"


def test_fields_of_the_engine_stand_beside_those_of_the_model(directory: Path) -> None:
    config = load(directory, MODEL + "    threads: 2\n    max_num_seqs: 7\n    labels: {team: a}")
    expected = EngineConfig(model=str(directory / "models/tiny"), threads=2, max_num_seqs=7)
    assert config.models[0].engine() == expected


def test_sampling_defaults_are_those_of_the_contract(directory: Path) -> None:
    config = load(directory, MODEL + "    default_sampling: {temperature: 0.5, top_k: 0}")
    sampling = config.models[0].sampling()
    assert sampling.temperature == 0.5
    assert sampling.HasField("top_k")
    assert not sampling.HasField("top_p")


@pytest.mark.parametrize(
    ("name", "tenant", "adapter_id"), [("pirate", "shared", "pirate"), ("acme/pirate", "acme", "pirate")]
)
def test_an_adapter_may_name_its_tenant(directory: Path, name: str, tenant: str, adapter_id: str) -> None:
    text = MODEL + f"adapter_roots: [adapters]\nadapters: [{{name: {name}, model: tiny, source: adapters/pirate}}]"
    adapter = load(directory, text).adapters[0]
    assert (adapter.tenant, adapter.adapter_id) == (tenant, adapter_id)


def with_constraint(directory: Path, constraint: str) -> ServiceConfig:
    entry = f"{{name: pirate, model: tiny, source: adapters/pirate, default_constraint: {constraint}}}"
    return load(directory, MODEL + f"adapter_roots: [adapters]\nadapters: [{entry}]")


@pytest.mark.parametrize(
    ("written", "constraint"),
    [
        ("{json_schema: {type: integer}}", Constraint(json_schema='{"type": "integer"}')),
        ("{json_object: true}", Constraint(json_object=JsonObject())),
        ("{regex: '[0-9]+'}", Constraint(regex="[0-9]+")),
        ("{choices: [yea, nay]}", Constraint(choices=Choices(values=["yea", "nay"]))),
        ("{grammar: 'root ::= \"a\"'}", Constraint(grammar='root ::= "a"')),
    ],
)
def test_an_adapter_may_have_a_default_constraint(directory: Path, written: str, constraint: Constraint) -> None:
    found = with_constraint(directory, written).adapters[0].default_constraint
    assert found is not None
    assert found.message() == constraint


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("{}", "'pirate': default_constraint: give one of json_schema, json_object, regex, choices, grammar"),
        ("{json_object: true, regex: a}", "default_constraint: give one of"),
        ("{regex: '('}", "default_constraint: regex: cannot be used"),
        ("{json_schema: {type: thing}}", "default_constraint: json_schema: cannot be used"),
        ("{json_scheme: {}}", "json_scheme"),
    ],
)
def test_a_default_constraint_that_cannot_be_kept_to_is_named(directory: Path, written: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        with_constraint(directory, written)
    assert problem in str(raised.value)


def test_the_environment_comes_before_the_file(directory: Path) -> None:
    config = load(
        directory,
        MODEL + "listen: 127.0.0.1:1\nadmin_listen: 127.0.0.1:2",
        LORAPLEX_LISTEN="127.0.0.1:3",
        LORAPLEX_DRAIN_GRACE_SECONDS="5",
        LORAPLEX_INSECURE="true",
    )
    assert config.listen == "127.0.0.1:3"
    assert config.admin_listen == "127.0.0.1:2"
    assert config.drain_grace_seconds == 5.0
    assert config.insecure is True


def test_what_kubernetes_sets_for_a_service_of_that_name_is_passed_over(directory: Path) -> None:
    config = load(directory, MODEL, LORAPLEX_PORT="tcp://10.0.0.1:50051", LORAPLEX_SERVICE_HOST="10.0.0.1")
    assert config.listen == "127.0.0.1:50051"


def test_a_value_of_the_environment_that_does_not_fit_is_named(directory: Path) -> None:
    assert "LORAPLEX_DRAIN_GRACE_SECONDS='soon'" in error_of(directory, MODEL, LORAPLEX_DRAIN_GRACE_SECONDS="soon")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            MODEL + "    max_seqs: 3", "unknown key 'max_seqs' in models[0]; did you mean", id="key of a model"
        ),
        pytest.param(MODEL + "lisen: x", "unknown key 'lisen' in the top level; did you mean 'listen'?", id="top key"),
        pytest.param(
            MODEL + "    adapters: []",
            "unknown key 'adapters' in models[0]: it belongs in the top level",
            id="top key within",
        ),
        pytest.param(
            MODEL + "max_num_seqs: 3",
            "unknown key 'max_num_seqs' in the top level: it belongs in models[]",
            id="too far up",
        ),
        pytest.param(
            MODEL + "limits: {adapter_root: x}", "did you mean 'adapter_roots' in the top level?", id="elsewhere"
        ),
        pytest.param(MODEL + "limits: {x: 1}", "unknown key 'x' in limits", id="key of a section"),
        pytest.param(MODEL + "limits: {connections: 0}", "limits: connections 0 must be from 1 to", id="no connection"),
        pytest.param(
            MODEL + "limits: {calls_per_connection: 4294967296}", "limits: calls_per_connection", id="calls without end"
        ),
        pytest.param(
            MODEL + "    threads: many", "Expected `int | null`, got `str` - at `models[0].threads`", id="type"
        ),
        pytest.param(MODEL + "    block_size: 3", "models[0] 'tiny': engine config: block_size 3", id="engine value"),
        pytest.param("models: []", "models: there is none", id="no model"),
        pytest.param("listen: x", "missing required field `models`", id="no models key"),
        pytest.param("[1, 2]", "a mapping is expected", id="no mapping"),
        pytest.param("models: [", "not valid YAML", id="no YAML"),
        pytest.param("listen: 2024-13-45", "not valid YAML: month must be in 1..12", id="no date"),
        pytest.param("listen: " + "[" * 10_000, "not valid YAML: maximum recursion depth", id="too deep"),
        pytest.param("limits: {1: a, 0x1: b}", "the key 1 appears twice", id="a number twice"),
        pytest.param("{[1]: 2}", "found unhashable key", id="a key that is a list"),
        pytest.param("listen: a:1\nlisten: b:1", "the key 'listen' appears twice", id="a key twice"),
        pytest.param("models: [{name: A b, model: x/y}]", "the name must be 1 to 63 of a-z", id="name of a model"),
        pytest.param("models: [{name: a, model: ./nowhere}]", "there is no directory", id="no such directory"),
        pytest.param("models: [{name: a, model: ./x.gguf}]", "and no .gguf file of that name", id="no such file"),
        pytest.param("models: [{name: a, model: a/b/x-00002-of-00003.gguf}]", "name the first one", id="another part"),
        pytest.param("models: [{name: a, model: x/y}, {name: a, model: x/z}]", "'a' appears 2 times", id="name twice"),
        pytest.param(
            MODEL + "    default_sampling: {temprature: 1}", 'has no field named "temprature"', id="sampling field"
        ),
        pytest.param(
            MODEL + "    default_sampling: {top_p: 7}", "default_sampling.top_p: must be above 0", id="sampling value"
        ),
        pytest.param(
            MODEL + "    default_sampling: {best_of: 2}", "default_sampling.best_of: cannot be a default", id="best of"
        ),
        pytest.param(
            MODEL + "    default_sampling: {top_p: 1" + "0" * 400 + "}", "top_p: the number is too large", id="huge"
        ),
        pytest.param(
            MODEL + "    default_sampling: {bad_words: ['']}", "bad_words[0]: has 0 characters", id="empty word"
        ),
        pytest.param(MODEL + "    chat_template: none.jinja", "chat_template: there is no file", id="chat template"),
        pytest.param(MODEL + "listen: 50051", "Expected `str`, got `int` - at `listen`", id="port alone"),
        pytest.param(MODEL + "listen: localhost", "host:port is expected", id="host alone"),
        pytest.param(MODEL + "listen: 0.0.0.0:1", "can be reached from other machines", id="open listener"),
        pytest.param(MODEL + "http_listen: 0.0.0.0:1", "can be reached from other machines", id="open http"),
        pytest.param(MODEL + "http_admin: true", "there is no http_listen", id="no http"),
        pytest.param(
            MODEL + "listen: 0.0.0.0:1\ntls: {certificate: c, key: k}",
            "set auth (or tls.client_ca), since anybody there could use it",
            id="open to everybody",
        ),
        pytest.param(
            MODEL + "listen: 0.0.0.0:1\nauth: {trusted_peers: [10.0.0.0/8]}",
            "set tls, since anybody on the way could read it",
            id="in the clear",
        ),
        pytest.param(MODEL + "auth: {}", "auth: there is nothing that a caller could show", id="no credentials"),
        pytest.param(MODEL + "auth: {keys: gone.yaml}", "auth: keys: there is no file", id="no key file"),
        pytest.param(MODEL + "auth: {trusted_peers: [here]}", "auth: trusted_peers: 'here'", id="no network"),
        pytest.param(
            MODEL + "auth: {certificates: [{name: a, tenant: b}]}", "set tls.client_ca", id="certificates unasked for"
        ),
        pytest.param(MODEL + "auth: {certificates: [{name: a, tenant: b, roles: [x]}]}", "Invalid enum", id="role"),
        pytest.param(MODEL + "log_level: LOUD", "log_level 'LOUD' is not one of", id="log level"),
        pytest.param(MODEL + "adapter_roots: [gone]", "adapter_roots: there is no directory", id="adapter root"),
        pytest.param(
            MODEL + "adapters: [{name: p, model: tiny, source: adapters/pirate}]",
            "adapter_roots is empty",
            id="no roots",
        ),
        pytest.param(
            MODEL + "adapter_roots: [adapters]\nadapters: [{name: p, model: big, source: adapters/pirate}]",
            "model 'big' is none of those configured: tiny",
            id="model of an adapter",
        ),
        pytest.param(
            MODEL + "adapter_roots: [adapters]\nadapters: [{name: ../x, model: tiny, source: adapters/pirate}]",
            "adapters[0] '../x': the name must be an id",
            id="name of an adapter",
        ),
        pytest.param(MODEL + "tenants: {acme: {weight: 0}}", "acme: weight 0.0 must be from 0.001", id="weight"),
        pytest.param(MODEL + "tenants: {A: {}}", "tenants: 'A' is not a name of a tenant", id="name of a tenant"),
        pytest.param(
            MODEL + "other_tenants: {max_priority: 101}", "other_tenants: max_priority 101 must be from", id="ceiling"
        ),
        pytest.param(MODEL + "drain_grace_seconds: -1", "drain_grace_seconds -1.0 must be 0, or", id="negative"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_place(directory: Path, text: str, expected: str) -> None:
    message = error_of(directory, text)
    assert message.startswith(f"{directory}/loraplex.yaml: ")
    assert expected in message


def test_all_mistakes_are_named_at_once(directory: Path) -> None:
    message = error_of(directory, MODEL + "    block_size: 3\nlisten: nonsense\nlog_level: LOUD")
    assert all(part in message for part in ("block_size 3", "listen 'nonsense'", "log_level 'LOUD'"))


def test_all_keys_that_do_not_exist_are_named_beside_other_mistakes(directory: Path) -> None:
    text = MODEL + "    max_seqs: 3\n    threds: 2\nlisen: x\nlimits: {x: 1}\nother_tenants: {wait: 1}\nlog_level: LOUD"
    message = error_of(directory, text)
    unknown = ("'max_seqs' in models[0]", "'threds' in models[0]", "'lisen' in the top", "'x' in limits")
    for part in (*unknown, "'wait' in other_tenants", "log_level 'LOUD'"):
        assert part in message


def test_all_keys_that_appear_twice_are_named_with_their_lines_beside_other_mistakes(directory: Path) -> None:
    text = (
        MODEL
        + "listen: a:1\nlimits: {calls_per_connection: 1,\n  calls_per_connection: 2}\nlisten: b:1\nlisten: c:1\nx: 1"
    )
    error = error_of(directory, text)
    first = MODEL.count("\n") + 1
    for key, line, again in (
        ("calls_per_connection", first + 1, first + 2),
        ("listen", first, first + 3),
        ("listen", first, first + 4),
    ):
        assert f"the key {key!r} appears twice, in line {line} and in line {again}" in error
    assert "unknown key 'x'" in error


def test_a_mapping_may_be_merged_into_another(directory: Path) -> None:
    text = MODEL + "tenants:\n  a: &a {weight: 2.0}\n  b: {<<: *a, max_priority: 1}"
    assert load(directory, text).tenants["b"].weight == 2.0


def test_all_values_of_a_wrong_type_are_named(directory: Path) -> None:
    text = "models: [{model: 3, threads: many}, {name: b, x: 1}]\ntls: yes\ntenants: {a: {weight: x}, b: 3}\nlimits: []"
    message = error_of(directory, text, LORAPLEX_LAME_DUCK_SECONDS="soon")
    for part in (
        "missing required field `name` in models[0]",
        "at `models[0].model`",
        "at `models[0].threads`",
        "missing required field `model` in models[1]",
        "unknown key 'x' in models[1]",
        "at `tls`",
        "at `tenants.a.weight`",
        "at `tenants.b`",
        "at `limits`",
        "LORAPLEX_LAME_DUCK_SECONDS='soon'",
    ):
        assert part in message


def floats() -> list[tuple[str, str]]:
    """Every float that the file can have, and how it is written down, with {} for its value."""
    section_texts = {
        "ServiceConfig": MODEL + "{}",
        "HostedModelConfig": MODEL + "    {}",
        "TenantConfig": MODEL + "tenants: {{acme: {{{}}}}}",
        "LimitsConfig": MODEL + "limits: {{{}}}",
        "SupervisionConfig": MODEL + "supervision: {{{}}}",
        "OtlpConfig": MODEL + "otlp: {{endpoint: 'http://a:1', {}}}",
        "JwtConfig": MODEL + "auth: {{jwt: {{issuer: i, audience: a, jwks: 'https://a', {}}}}}",
    }
    return [
        (field.name, section_texts[section.__name__].format(f"{field.name}: {{}}"))
        for _, section in sections(ServiceConfig)
        for field in msgspec.structs.fields(section)
        if float in (field.type, *get_args(field.type))
    ]


@pytest.mark.parametrize(("name", "text"), floats())
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "-1", "-0.5"])
def test_a_float_that_is_no_amount_is_refused_by_name(directory: Path, name: str, text: str, value: str) -> None:
    assert f"{name} " in error_of(directory, text.replace("{}", value))


@pytest.mark.parametrize(("name", "text"), floats())
@pytest.mark.parametrize("value", ["5.0e-324", "1.0e-300", "1.0e-40", "1.0e+10", "1.0e+300"])
def test_an_amount_that_is_next_to_nothing_or_beyond_all_bounds_is_refused_by_name(
    directory: Path, name: str, text: str, value: str
) -> None:
    assert f"{name} {float(value)} must be" in error_of(directory, text.replace("{}", value))


@pytest.mark.parametrize("weight", ["0.0005", "2000"])
def test_a_weight_that_no_counter_could_follow_is_refused(directory: Path, weight: str) -> None:
    assert "must be from 0.001 to 1000" in error_of(directory, MODEL + f"tenants: {{acme: {{weight: {weight}}}}}")


@pytest.mark.parametrize(("name", "text"), floats())
def test_nothing_that_must_take_time_or_room_is_0(directory: Path, name: str, text: str) -> None:
    if name in MAY_BE_ZERO:
        load(directory, text.replace("{}", "0"))
    else:
        assert f"{name} 0.0 must be" in error_of(directory, text.replace("{}", "0"))


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [".nan", ".inf", "'NaN'", "'Infinity'", "'-Infinity'"])
def test_sampling_defaults_that_are_no_numbers_are_refused_by_name(directory: Path, name: str, value: str) -> None:
    assert name in error_of(directory, MODEL + f"    default_sampling: {{{name}: {value}}}")


def test_listeners_with_tls_and_credentials_may_be_reached_from_anywhere(directory: Path) -> None:
    (directory / "keys.yaml").write_text("keys: []")
    tls = "listen: 0.0.0.0:1\ntls: {certificate: c, key: k"
    for text in (tls + "}\nauth: {keys: keys.yaml}", tls + ", client_ca: a}"):
        assert load(directory, MODEL + text).listen == "0.0.0.0:1"


def test_an_open_listener_is_allowed_when_asked_for(directory: Path) -> None:
    assert load(directory, MODEL + "listen: 0.0.0.0:1\ninsecure: true").listen == "0.0.0.0:1"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "gone.yaml", {})


# ---- several models on one GPU ---------------------------------------------------------------------------------------


def models(*fields: str) -> str:
    return "models:\n" + "".join(f"  - {{name: m{i}, model: models/tiny, {each}}}\n" for i, each in enumerate(fields))


def test_fractions_that_are_more_than_the_gpu_are_named(directory: Path) -> None:
    error = error_of(directory, models(*(f"device: 'cuda:0', device_memory_fraction: {each}" for each in (0.7, 0.5))))
    assert "device_memory_fraction: 'm0' 0.7, 'm1' 0.5 are on cuda:0, and 1.2 together: make it at most 1" in error


@pytest.mark.parametrize("fraction", ["0", "-0.5", "1.01", ".nan"])
def test_a_fraction_that_is_none_is_refused(directory: Path, fraction: str) -> None:
    assert "must be from 0.0001 to 1" in error_of(directory, models(f"device_memory_fraction: {fraction}"))
