"""Checkpoints: every tensor that the model has, none that it has not, and nothing read twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex_engine.checkpoint.hub import resolve_model
from loraplex_engine.checkpoint.memory import HUGE_PAGE_BYTES
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.weights import MAX_JSON_BYTES, Checkpoint, canonical_name, read_json

CPU = torch.device("cpu")


def numbered(*shape: int, dtype: torch.dtype = torch.float32, first: int = 0) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(first, first + count).to(dtype).view(shape)


def write(directory: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    save_file(tensors, directory / name)
    return directory


def write_shards(directory: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    for name, tensors in shards.items():
        write(directory, tensors, name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_a_file_of_json_that_no_model_needs_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ModelError, match=r"config\.json: has 268435457 bytes; at most 268435456 of JSON are read"):
        read_json(tmp_path / "config.json")


def test_tensors_are_stacked_in_the_order_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"a": numbered(2, 3), "b": numbered(1, 3, first=100)})
    with Checkpoint(tmp_path) as checkpoint:
        stacked = checkpoint.stacked([("b", ()), ("a", ())], torch.float32, CPU)
    assert stacked.tolist() == [[100, 101, 102], [0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_any_float_is_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    write(tmp_path, {"a": numbered(4, 4, dtype=stored)})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.dtype("a") == stored
        assert torch.equal(checkpoint.stacked([("a", ())], wanted, CPU), numbered(4, 4, dtype=wanted))


def test_parameters_do_not_share_memory_with_the_file(tmp_path: Path) -> None:
    write(tmp_path, {"a": numbered(2, 2)})
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.stacked([("a", ())], torch.float32, CPU).zero_()
        assert torch.equal(checkpoint.stacked([("a", ())], torch.float32, CPU), numbered(2, 2))


def test_parts_of_tensors_are_read_alone(tmp_path: Path) -> None:
    whole = numbered(4, 6)
    write(tmp_path, {"a": whole, "b": whole + 100})
    with Checkpoint(tmp_path) as checkpoint:
        parts = [("b", (slice(2, 3), slice(3, 6))), ("a", (slice(0, 2), slice(3, 6)))]
        wanted = torch.cat((whole[2:3, 3:] + 100, whole[:2, 3:]))
        assert torch.equal(checkpoint.stacked(parts, torch.float32, CPU), wanted)
        assert torch.equal(checkpoint.dense("a", torch.float32, CPU, (slice(1, 4),)), whole[1:])


def test_matrix_of_huge_pages_holds_what_is_stored(tmp_path: Path) -> None:
    rows = HUGE_PAGE_BYTES // 4096 + 1  # a little more than one page
    write(tmp_path, {"a": numbered(rows, 1024)})
    with Checkpoint(tmp_path) as checkpoint:
        stacked = checkpoint.stacked([("a", ())], torch.float32, CPU)
    assert torch.equal(stacked, numbered(rows, 1024))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    write_shards(
        tmp_path, {"x-1.safetensors": {"a": numbered(1, 2)}, "x-2.safetensors": {"b": numbered(1, 2, first=5)}}
    )
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.check({"a": (1, 2), "b": (1, 2)})
        assert checkpoint.stacked([("a", ()), ("b", ())], torch.float32, CPU).tolist() == [[0, 1], [5, 6]]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x-1.safetensors": {"a": numbered(1)}, "x-2.safetensors": {"b": numbered(1)}})
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"x-2\.safetensors: .*not there"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_shards_stay_in_the_directory(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelError, match="in the same directory"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}], ids=str)
def test_an_index_without_shards_is_refused(tmp_path: Path, index: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="weight_map must map each tensor"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("cut", [4, 60, -8])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, {"a": numbered(16, 16)}) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a valid safetensors file"):
        Checkpoint(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*it has pytorch_model\.bin"):
        Checkpoint(tmp_path)


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    write(tmp_path, {"a": numbered(2, 3), "extra": numbered(1), "ints": torch.zeros(2, dtype=torch.int8)})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ModelError) as caught:
        checkpoint.check({"a": (3, 2), "ints": (2,), "absent": (1,)})
    message = str(caught.value)
    assert "1 tensors missing: absent" in message
    assert "1 tensors unexpected: extra" in message
    assert "a is [2, 3], config.json makes it [3, 2]" in message
    assert "ints is I8" in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    write(tmp_path, {"a": numbered(1)})
    expected = {f"t{number}": (1,) for number in range(30)}
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ModelError, match=r"30 tensors missing: t0, .* and 22 more"):
        checkpoint.check(expected)


def test_buffers_and_unused_towers_are_left_out(tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.x", "lm_head.weight")
    write(tmp_path, {name: numbered(1) for name in names})
    with Checkpoint(tmp_path, ("vision_tower.",)) as checkpoint:
        checkpoint.check({"lm_head.weight": (1,)})
        assert checkpoint.nbytes == 4
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ModelError, match=r"unexpected: vision_tower\.x"):
        checkpoint.check({"lm_head.weight": (1,)})


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.text_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
    ],
)
def test_wrappers_around_the_language_model_are_taken_off(stored: str, canonical: str) -> None:
    assert canonical_name(stored) == canonical


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"norm.weight": numbered(1), "model.norm.weight": numbered(1)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is there twice"):
        Checkpoint(tmp_path)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    write(tmp_path, {"a": numbered(2, 3), "b": numbered(1, 3, dtype=torch.float64)})
    seen: list[tuple[int, int]] = []
    with Checkpoint(tmp_path, progress=lambda done, total: seen.append((done, total))) as checkpoint:
        checkpoint.stacked([("a", ()), ("b", ())], torch.float32, CPU)
    assert seen == [(24, 48), (48, 48)]


def test_a_directory_is_the_model(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["./no/such/directory", "/no/such", "a/b/c", "https://example.org/x"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(
    model: str,
) -> None:
    with pytest.raises(ModelError, match="no such directory, and not of the form of a hub id"):
        resolve_model(model)


def hub_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local hub cache and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_hub_id_that_cannot_be_fetched_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match=r"'owner/name' at revision 'abc'.*not in the local hub cache"):
        resolve_model("owner/name", "abc")


def test_a_file_of_a_repository_is_fetched_with_its_parts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options["revision"], options["allow_patterns"]))
        (tmp_path / "Q4").mkdir()
        (tmp_path / "Q4/x-00001-of-00002.gguf").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = resolve_model("owner/name/Q4/x-00001-of-00002.gguf", "abc")
    assert found == tmp_path / "Q4/x-00001-of-00002.gguf"
    assert asked == [("owner/name", "abc", ["Q4/x-00001-of-00002.gguf", "Q4/x-00002-of-00002.gguf"])]


def test_a_download_is_told_of_as_long_as_something_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []

    class Told:
        def __call__(self, bytes_loaded: int, bytes_total: int) -> None:
            raise AssertionError("nothing is read here")

        def waits(self, what: str) -> None:
            waited.append(what)

    def snapshot_download(repository: str, **options: Any) -> str:
        with options["tqdm_class"](total=2, disable=True) as bar:
            for arrived in (1, 0, 1):
                bar.update(arrived)
        (tmp_path / "config.json").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    resolve_model("owner/name", report=Told())
    assert waited == ["the download of owner/name"] * 2


MEANT = r"holds no config\.json, but the GGUF files a\.gguf, b\.gguf: name one of them"


def test_a_directory_of_gguf_files_says_that_one_is_to_be_named(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "README.md"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=MEANT):
        resolve_model(str(tmp_path))


def test_a_repository_of_gguf_files_says_that_one_is_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **options: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, revision: ["b.gguf", "a.gguf"])
    with pytest.raises(ModelError, match=MEANT):
        resolve_model("owner/name")


def test_a_hub_id_is_found_in_the_cache_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path, monkeypatch)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert resolve_model("owner/name", commit) == snapshot
