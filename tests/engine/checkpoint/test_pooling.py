"""How a checkpoint says that it embeds, in the files that sentence-transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.pooling import read_pooling
from loraplex_engine.link.pooling import STATES_NOTHING, ModelPooling, PoolingMethod

TYPES = "sentence_transformers.models."


def write(directory: Path, kinds: list[str], pooling: dict[str, Any]) -> Path:
    modules = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": f"{TYPES}{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    if "Pooling" in kinds:
        folder = directory / f"{kinds.index('Pooling')}_Pooling"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(pooling))
    return directory


def flags(**true: bool) -> dict[str, Any]:
    names = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    return {"word_embedding_dimension": 8, **{f"pooling_mode_{name}": name in true for name in names}}


def test_a_checkpoint_without_such_files_states_nothing(tmp_path: Path):
    assert read_pooling(tmp_path) == STATES_NOTHING


@pytest.mark.parametrize(
    ("kinds", "pooling", "method", "normalize"),
    [
        (["Transformer", "Pooling", "Normalize"], flags(lasttoken=True), PoolingMethod.LAST, True),
        (["Transformer", "Pooling"], flags(mean_tokens=True), PoolingMethod.MEAN, False),
        (["Transformer", "Pooling"], {"pooling_mode": "lasttoken"}, PoolingMethod.LAST, False),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode": "mean"}, PoolingMethod.MEAN, True),
    ],
)
def test_the_stated_pooling_is_read(
    tmp_path: Path, kinds: list[str], pooling: dict[str, Any], method: PoolingMethod, normalize: bool
):
    assert read_pooling(write(tmp_path, kinds, pooling)) == ModelPooling(method, normalize)


@pytest.mark.parametrize(
    ("kinds", "pooling", "problem"),
    [
        (["Transformer", "Pooling", "Dense"], flags(mean_tokens=True), "has the module Dense"),
        (["Transformer"], {}, "has no module Pooling"),
        (["Transformer", "Pooling"], flags(max_tokens=True), "1_Pooling/config.json says to pool by max_tokens"),
        (["Transformer", "Pooling"], flags(lasttoken=True, mean_tokens=True), "by mean and lasttoken"),
        (["Transformer", "Pooling"], flags(), "by nothing"),
    ],
)
def test_what_cannot_be_done_is_named(tmp_path: Path, kinds: list[str], pooling: dict[str, Any], problem: str):
    assert problem in read_pooling(write(tmp_path, kinds, pooling)).problem


def test_files_that_make_no_sense_are_refused(tmp_path: Path):
    (tmp_path / "modules.json").write_text('{"idx": 0}')
    with pytest.raises(ModelError, match="must hold a list of modules"):
        read_pooling(tmp_path)
