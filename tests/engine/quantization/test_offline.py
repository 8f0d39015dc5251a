"""`loraplex quantize`: what it refuses at once; and, where the packages are, that its copies load and answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from loraplex_quantize import __main__ as offline
from loraplex_service.cli import main
from tests.engine.quantization import packing
from tests.engine.quantization.checkpoints import Twins, load, logits, make_twins
from tests.engine.quantization.formats import gptq

ROOT = Path(__file__).parents[3]
OURS = os.pathsep.join(str(ROOT / room) for room in ("engine", "adapters", "kernels"))
# A Python with gptqmodel, bitsandbytes and what Loraplex needs: they may not share an environment with the tests.
PYTHON = os.environ.get("LORAPLEX_QUANTIZE_PYTHON")
SCRIPT = Path(__file__).with_name("package_weights.py")
TOKENS = torch.arange(5, 45)
TOLERANCE = 1e-5  # of the largest logit, float32 on both sides


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as caught:
        offline.main([str(argument) for argument in arguments])
    return str(caught.value)


def test_a_quantised_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    message = refusal(capsys, twins.quantised, "--method", "nf4", "--out", tmp_path / "out")
    assert "is quantised already (gptq-4bit-g32)" in message


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    message = refusal(capsys, twins.dense, "--method", "nf4", "--out", tmp_path)
    assert "exists; name a directory that does not" in message


@pytest.mark.parametrize(("method", "package"), [("gptq", "gptqmodel"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    message = refusal(capsys, twins.dense, "--method", method, "--out", tmp_path / "out")
    assert f"{method} is done by {package}" in message
    assert "install 'loraplex-server[" in message


def test_the_command_runs_the_engines_side(tmp_path: Path) -> None:
    """Its exit status is the command's; the message is the child's own, on its stderr."""
    result = CliRunner().invoke(main, ["quantize", str(tmp_path), "--method", "nf4", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="LORAPLEX_QUANTIZE_PYTHON names no Python that has the packages")
@pytest.mark.parametrize("method", ["nf4", "int8", "gptq", "awq"])
def test_a_copy_answers_by_the_weights_that_its_package_reads(tmp_path: Path, method: str) -> None:
    """How far those are from the model's own is the method's affair."""
    source, out, text = ROOT / "demo/loraplex_demo/models/storyteller", tmp_path / "out", tmp_path / "text"
    text.write_text((ROOT / "README.md").read_text() * 2)
    options: list[str | Path] = ["--method", method, "--out", out, "--text", text, "--calibration", text]
    options += ["--group-size", "64", "--samples", "4"]  # AWQ takes seconds for each sample
    assert "perplexity" in run(["-m", "loraplex_quantize", source, *options], {"PYTHONPATH": OURS})
    assert (out / "tokenizer.json").exists()
    twins = Twins(out, tmp_path / "dense")
    write_dense(twins)
    wanted, found = (logits(load(directory, dtype="float32"), TOKENS) for directory in (twins.dense, out))
    # The same weights but for their last bit: the packages multiply scales, zeros and codes in another order.
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def run(arguments: Sequence[str | Path], environment: Mapping[str, str]) -> str:
    """What the packages' Python prints."""
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(environment),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def write_dense(twins: Twins) -> None:
    """The quantised model with the weights that its package makes of it."""
    twins.dense.mkdir()
    run(["-P", SCRIPT, twins.quantised, twins.dense / "weights"], {})
    weights = load_file(twins.dense / "weights")
    stored = load_file(twins.quantised / "model.safetensors")
    quantised = tuple(f"{path}." for path in weights)
    dense = {name: tensor for name, tensor in stored.items() if not name.startswith(quantised)}
    dense |= {f"{path}.weight": weight for path, weight in weights.items()}
    save_file(dense, twins.dense / "model.safetensors")
    raw = json.loads((twins.quantised / "config.json").read_text())
    del raw["quantization_config"]
    (twins.dense / "config.json").write_text(json.dumps(raw))
    (twins.dense / "weights").unlink()
