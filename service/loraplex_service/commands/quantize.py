"""`loraplex quantize`: hands the work to a process of the engine's side, where torch and the quantisers live."""

import subprocess
import sys
from pathlib import Path

import click

COMMAND = (sys.executable, "-m", "loraplex_quantize")
EXISTING_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("model")
@click.option("--method", type=click.Choice(["gptq", "awq", "nf4", "int8"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A directory that does not exist yet.")
@click.option("--calibration", type=EXISTING_FILE, help="Text like what the model will be given; for gptq and awq.")
@click.option("--text", type=EXISTING_FILE, help="Measure the perplexity of this text before and after.")
@click.option(
    "--group-size",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Input features that share a scale; for gptq and awq.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Stretches of 512 tokens of the calibration text that gptq and awq use; fewer are faster.",
)
def quantize(model: str, **given: str | int | Path | None) -> None:
    """Write a quantised copy of MODEL, a directory or a hub id.

    gptq and awq need the extra `quantize`, nf4 and int8 the extra `bitsandbytes`; serving the copy needs neither.
    """
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    sys.exit(subprocess.run([*COMMAND, *options, "--", model]).returncode)
