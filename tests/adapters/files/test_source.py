import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraplex_adapters.errors import AdapterRejected, SourceNotAllowed
from loraplex_adapters.files.source import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSource,
    ReceivedDigest,
    describe,
    digest,
    digest_of,
    fingerprint,
    text_digest,
)

AdapterMaker = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> AdapterSource:
    return AdapterSource([tmp_path])


def test_a_path_relative_to_a_root_is_resolved(source: AdapterSource, make_adapter: AdapterMaker) -> None:
    directory = make_adapter("legal-v2")
    assert source.resolve("legal-v2") == directory
    assert source.resolve("legal-v2/") == directory


def test_an_absolute_path_or_uri_under_a_root_is_resolved(source: AdapterSource, make_adapter: AdapterMaker) -> None:
    directory = make_adapter()
    assert source.resolve(str(directory)) == directory
    assert source.resolve(f"file://{directory}") == directory


def test_the_first_root_that_has_it_wins(tmp_path: Path) -> None:
    for path in ("one/x", "two/x", "two/y"):
        (tmp_path / path).mkdir(parents=True)
    source = AdapterSource([tmp_path / "one", tmp_path / "two"])
    assert source.resolve("x") == tmp_path / "one/x"
    assert source.resolve("y") == tmp_path / "two/y"


def test_a_root_that_does_not_exist_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        AdapterSource([tmp_path / "absent"])


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "/",
        ".",
        "..",
        "../secret",
        "a/../../secret",
        ".hidden",
        "a\0b",
        "a b",
        "a\\..\\b",
        "~root",
        "/etc",
        "file:///etc",
        "file://../secret",
        "http://example.org/a",
        "s3://bucket/a",
        "hf://a/b",
        "missing",
        "ä",
        "a" * 2000,
        "a" * 129,
    ],
)
def test_what_is_not_under_a_root_is_refused(tmp_path: Path, reference: str) -> None:
    (tmp_path / "root/a/b").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    with pytest.raises(SourceNotAllowed):
        AdapterSource([tmp_path / "root"]).resolve(reference)


@pytest.mark.parametrize(
    "spelling", ["a/b", "./a/b", "a/./b", "a//b", "a/b/", "a/../a/b", "{root}/a/b", "{root}/../root/a/b"]
)
def test_a_directory_under_a_root_is_found_however_it_is_written(tmp_path: Path, spelling: str) -> None:
    (tmp_path / "root/a/b").mkdir(parents=True)
    found = AdapterSource([tmp_path / "root"]).resolve(spelling.format(root=tmp_path / "root"))
    assert found == tmp_path / "root/a/b"


@pytest.mark.parametrize("name", ["with space", "ä", ".hidden", "-x", "a" * 200])
def test_a_directory_under_a_root_is_found_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert AdapterSource([tmp_path]).resolve(name) == tmp_path / name


def test_the_snapshots_of_the_hub_s_cache_can_be_a_root(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    for directory in (snapshot, blobs):
        directory.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (blobs / name).write_text("{}")
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert AdapterSource([snapshot.parent]).resolve("0123") == snapshot
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceNotAllowed):
        AdapterSource([snapshot.parent]).resolve("0123")


def test_an_absolute_path_with_dots_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").mkdir()
    with pytest.raises(SourceNotAllowed):
        AdapterSource([tmp_path / "root"]).resolve(f"{tmp_path}/root/../secret")


def test_a_root_is_no_prefix_of_text(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "rooted").mkdir()
    with pytest.raises(SourceNotAllowed):
        AdapterSource([tmp_path / "root"]).resolve(str(tmp_path / "rooted"))


def test_a_link_that_leads_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceNotAllowed):
        AdapterSource([tmp_path / "root"]).resolve("link")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_a_link_out_of_the_root_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "root/a").mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "root/a" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(SourceNotAllowed):
        AdapterSource([tmp_path / "root"]).resolve("a")


def test_a_link_that_stays_under_the_root_is_followed(
    tmp_path: Path, source: AdapterSource, make_adapter: AdapterMaker
) -> None:
    directory = make_adapter("v1")
    (tmp_path / "latest").symlink_to(directory)
    assert source.resolve("latest") == directory


def test_links_in_a_circle_are_refused(tmp_path: Path, source: AdapterSource) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(SourceNotAllowed):
        source.resolve("a")


def test_a_description_says_what_the_files_hold(make_adapter: AdapterMaker) -> None:
    directory = make_adapter(base_model_name_or_path="some/base")
    described = describe(directory)
    assert described.digest == digest(directory)
    assert described.rank == 4
    assert described.module_ranks == {f"model.layers.{i}.self_attn.q_proj": 4 for i in range(2)}
    assert described.target_modules == ("q_proj",)
    assert described.size_bytes == 2 * 4 * 4 * (8 + 12)
    assert described.config.base_model == "some/base"


def test_the_digest_depends_on_every_byte_of_config_and_weights(make_adapter: AdapterMaker) -> None:
    digests = {
        digest(make_adapter("a")),
        digest(make_adapter("b", seed=1)),
        digest(make_adapter("c", lora_alpha=9)),
        digest_of(b"ab", [b"c"]),
        digest_of(b"a", [b"bc"]),
    }
    assert len(digests) == 5


def test_the_same_content_elsewhere_has_the_same_digest(make_adapter: AdapterMaker) -> None:
    first, second = make_adapter("a"), make_adapter("b")
    assert digest(first) == digest(second)
    config, weights = ((first / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert digest_of(config, [weights[:100], weights[100:]]) == digest(first)


def received(directory: Path, *names: str) -> ReceivedDigest:
    """What is known of files that came in this order, in small pieces."""
    made = ReceivedDigest()
    for name in names:
        content = (directory / name).read_bytes()
        for start in range(0, len(content), 100):
            made.add(name, content[start : start + 100])
    return made


@pytest.mark.parametrize("more", [(), ("tokenizer.json",), ("tokenizer.json", "added_tokens.json")])
def test_files_that_come_in_pieces_have_the_digest_that_they_have_on_disk(
    make_adapter: AdapterMaker, more: tuple[str, ...]
) -> None:
    directory = make_adapter()
    for name in more:
        (directory / name).write_text(name)
    for names in ((CONFIG_FILE, WEIGHTS_FILE, *more), (*more, CONFIG_FILE, WEIGHTS_FILE)):
        made = received(directory, *names)
        assert made.digests() == (digest(directory), text_digest(directory))
        assert describe(directory, made) == describe(directory)


def test_files_of_which_the_config_comes_late_are_read_for_their_digest(make_adapter: AdapterMaker) -> None:
    directory = make_adapter()
    made = received(directory, WEIGHTS_FILE, CONFIG_FILE)
    assert made.digests() is None
    assert describe(directory, made) == describe(directory)


def problems_of(directory: Path) -> str:
    with pytest.raises(AdapterRejected) as caught:
        describe(directory)
    return str(caught.value)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "adapter.pt", "x.ckpt", "y.pkl"])
def test_pickled_weights_are_refused_unread(make_adapter: AdapterMaker, name: str) -> None:
    directory = make_adapter()
    (directory / "adapter_model.safetensors").rename(directory / name)
    problems = problems_of(directory)
    assert name in problems
    assert "safetensors only" in problems


def test_weights_in_shards_are_refused(make_adapter: AdapterMaker) -> None:
    directory = make_adapter()
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model-00001-of-00002.safetensors")
    assert "shards" in problems_of(directory)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(make_adapter: AdapterMaker, name: str) -> None:
    directory = make_adapter()
    (directory / name).unlink()
    assert f"{name} is missing" in problems_of(directory)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_instead_of_a_file_is_refused_and_does_not_hang(make_adapter: AdapterMaker, name: str) -> None:
    directory = make_adapter()
    (directory / name).unlink()
    os.mkfifo(directory / name)
    assert "not a plain file" in problems_of(directory)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_directory_instead_of_a_file_is_refused(make_adapter: AdapterMaker, name: str) -> None:
    directory = make_adapter()
    (directory / name).unlink()
    (directory / name).mkdir()
    assert "not a plain file" in problems_of(directory)


def test_a_config_that_is_too_large_is_refused_unread(make_adapter: AdapterMaker) -> None:
    directory = make_adapter()
    with (directory / "adapter_config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert "at most" in problems_of(directory)


def test_weights_that_are_too_large_are_refused_unread(make_adapter: AdapterMaker) -> None:
    directory = make_adapter()
    with (directory / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert "at most" in problems_of(directory)


def test_an_adapter_with_no_lora_tensors_is_refused(make_adapter: AdapterMaker) -> None:
    assert "no LoRA tensors" in problems_of(make_adapter(tensors={}))


def test_foreign_tensors_are_all_named(make_adapter: AdapterMaker) -> None:
    tensors = {name: torch.ones(1) for name in ("x.lora_diag", "x.modules_to_save.weight", "x.lora_C.weight")}
    problems = problems_of(make_adapter(tensors=tensors))
    assert all(name in problems for name in tensors)


def test_an_a_of_the_wrong_shape_is_refused(make_adapter: AdapterMaker) -> None:
    problems = problems_of(
        make_adapter(tensors={"x.lora_A.weight": torch.ones(3), "y.lora_A.weight": torch.ones(0, 3)})
    )
    assert "x.lora_A.weight: shape [3]" in problems
    assert "y.lora_A.weight: shape [0, 3]" in problems


def test_the_service_side_never_imports_torch() -> None:
    modules = ("key", "errors", "registry", "files.config", "files.source", "files.depot", "files.remote")
    imports = ", ".join(f"loraplex_adapters.{module}" for module in modules)
    script = f"import sys, {imports}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).resolve().parents[3])


def test_extra_files_are_not_looked_at(make_adapter: AdapterMaker) -> None:
    directory = make_adapter()
    before = digest(directory)
    (directory / "optimizer.pt").write_bytes(b"pickle")
    (directory / "README.md").write_text(json.dumps({}))
    save_file({"x": torch.ones(1)}, directory / "other.safetensors")
    assert digest(directory) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_the_digest_and_the_fingerprint_cover_the_files_of_its_text(make_adapter: AdapterMaker, name: str) -> None:
    directory = make_adapter()
    seen = {(digest(directory), fingerprint(directory))}
    for content in ("{}", "{ }"):
        (directory / name).write_text(content)
        seen.add((digest(directory), fingerprint(directory)))
        assert describe(directory).digest == digest(directory)
    assert len({found for found, _ in seen}) == len({found for _, found in seen}) == 3


def test_content_cannot_move_between_the_files_of_its_text(make_adapter: AdapterMaker) -> None:
    digests = set()
    for index, (first, second) in enumerate([("ab", "c"), ("a", "bc"), ("abc", "")]):
        directory = make_adapter(f"adapter{index}")
        (directory / "added_tokens.json").write_text(first)
        (directory / "chat_template.jinja").write_text(second)
        digests.add(digest(directory))
    assert len(digests) == 3


def test_a_file_of_its_text_that_is_too_large_is_refused_unread(make_adapter: AdapterMaker) -> None:
    directory = make_adapter()
    with (directory / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(AdapterRejected, match=r"tokenizer\.json: .* at most"):
        describe(directory)


def test_a_file_of_its_text_may_not_lead_out_of_the_roots(make_adapter: AdapterMaker, tmp_path: Path) -> None:
    directory = make_adapter()
    outside = tmp_path.parent / f"{tmp_path.name}-outside.json"
    outside.write_text("{}")
    (directory / "tokenizer.json").symlink_to(outside)
    with pytest.raises(SourceNotAllowed):
        AdapterSource([tmp_path]).resolve(directory.name)


def test_an_adapter_on_the_parameter_of_all_experts_has_the_rank_that_its_config_states(tmp_path: Path) -> None:
    """Of A it has that many rows for each of eight experts."""
    fields = {
        "peft_type": "LORA",
        "r": 4,
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "rank_pattern": {"experts.gate_up_proj": 6},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    prefix = "base_model.model.model.layers.0.mlp.experts"
    shapes = {f"{prefix}.base_layer": (8 * 6, 16), prefix: (8 * 4, 12)}
    tensors = {f"{module}.lora_A.weight": torch.zeros(shape) for module, shape in shapes.items()}
    tensors |= {f"{module}.lora_B.weight": torch.zeros(20, rows) for module, (rows, _) in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert describe(tmp_path).rank == 6
