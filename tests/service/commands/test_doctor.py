"""`loraplex doctor`: what it finds, and its exit status."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loraplex_service.cli import main
from loraplex_service.commands import doctor
from loraplex_service.commands.doctor import kernel_report, of_kernels, of_models, of_ports
from loraplex_service.config import ServiceConfig
from loraplex_service.models.config import HostedModelConfig

REPORT: dict[str, Any] = {
    "torch": "2.13",
    "cuda": None,
    "cpu": {"instruction_set": "avx2", "cores": 2},
    "gpus": [],
    "triton": None,
}
GPU = {"name": "A card", "memory_bytes": 80 << 30, "free_bytes": 79 << 30}


def settings(tmp_path: Path, **more: Any) -> ServiceConfig:
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(1 << 20))
    return ServiceConfig(models=(HostedModelConfig(name="m", model=str(tmp_path / "m"), device="cpu"),), **more)


def verdicts(findings: Any) -> list[str]:
    return [finding.verdict for finding in findings]


def test_kernels_that_load_are_reported_with_their_instruction_set() -> None:
    report = kernel_report()
    assert verdicts(of_kernels(report))[0] == "ok", report
    assert report["cpu"]["instruction_set"] in ("portable", "avx2", "avx512", "avx512bf16", "amx")


@pytest.mark.parametrize(
    ("report", "expected", "words"),
    [
        (REPORT, ["ok", "note"], "models compute on the CPU"),
        ({"error": "No module named 'torch'"}, ["FAIL"], "No module named 'torch'"),
        ({**REPORT, "cpu": {"error": "no compiled kernels are installed"}}, ["FAIL", "note"], "C++ compiler"),
        ({**REPORT, "cuda": "12.8", "gpus": [GPU], "triton": "3.9"}, ["ok", "ok"], "79.0 of 80.0 GiB free"),
        ({**REPORT, "cuda": "12.8", "gpus": [GPU]}, ["ok", "FAIL"], "pip install triton"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(report: dict[str, Any], expected: list[str], words: str) -> None:
    findings = list(of_kernels(report))
    assert verdicts(findings) == expected
    assert words in " ".join(finding.text for finding in findings)


def test_a_model_that_does_not_fit_is_a_failure(tmp_path: Path) -> None:
    assert verdicts(of_models(settings(tmp_path), 8 << 30, REPORT)) == ["ok"]
    [finding] = of_models(settings(tmp_path), 100 << 20, REPORT)
    assert (finding.verdict, "does not fit; quantise it" in finding.text) == ("FAIL", True)


def test_a_model_that_is_not_here_yet_cannot_be_judged() -> None:
    config = ServiceConfig(models=(HostedModelConfig(name="m", model="owner/model"),))
    [finding] = of_models(config, 8 << 30, REPORT)
    assert (finding.verdict, "not on this machine yet" in finding.text) == ("note", True)


def test_a_port_that_is_taken_is_noted(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        findings = list(of_ports(settings(tmp_path, listen=address, admin_listen="127.0.0.1:0")))
    assert verdicts(findings) == ["note"]
    assert address in findings[0].text


def test_the_exit_status_says_whether_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "kernel_report", lambda: REPORT)
    file = tmp_path / "loraplex.yaml"
    file.write_text("modles: []")
    wrong = CliRunner().invoke(main, ["doctor", "--config", str(file), "--json"])
    right = CliRunner().invoke(main, ["doctor"])
    assert (wrong.exit_code, right.exit_code) == (1, 0), right.output
    assert "did you mean 'models'?" in json.loads(wrong.output)[-1]["text"]
    assert "storyteller: about" in right.output
