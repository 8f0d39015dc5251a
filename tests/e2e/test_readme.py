"""The README's programs, run as they stand against the server that it tells to start."""

import asyncio
import re
import sys
from asyncio.subprocess import PIPE

import pytest

from tests.docs.pages import ROOT, Block, blocks
from tests.e2e.conftest import Server

PROGRAMS = [block for block in blocks("python") if block.page == ROOT / "README.md"]
ADDRESS = "127.0.0.1:50051"


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
@pytest.mark.usefixtures("client")  # its models are loaded
async def test_a_program_of_the_readme_prints_a_story(program: Block, server: Server) -> None:
    assert ADDRESS in program.text
    text = program.text.replace(ADDRESS, server.data)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", text, stdout=PIPE)
    printed, _ = await asyncio.wait_for(process.communicate(), timeout=60)
    assert process.returncode == 0
    assert len(re.findall(r"[a-z]+", printed.decode())) > 10
