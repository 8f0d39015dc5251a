"""Bodies whose texts come in many parts become messages in the memory that their size asks for."""

import subprocess
import sys

import pytest

ROOM = 256 << 20
CHILD = f"""
import resource
from loraplex_service.http.dialects import TABLES

sizes = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("VmSize"))
most = int(sizes["VmSize"].split()[0]) * 1024 + {ROOM}
resource.setrlimit(resource.RLIMIT_AS, (most, most))
large, parts = "x" * (1 << 20), 1000
[table] = [table for table in TABLES if table.path == PATH]
print(table.read(BODY).message.ByteSize() >= len(large))
"""
TURNS = '{"messages": [{"role": ROLE, "content": [BLOCK | {KEY: text} for text in [large] + [""] * parts]}]}'
TEXTS = TURNS.replace("ROLE", "'user'").replace("BLOCK", "{'type': 'text'}").replace("KEY", "'text'")
THOUGHTS = TURNS.replace("ROLE", "'assistant'").replace("BLOCK", "{'type': 'thinking'}").replace("KEY", "'thinking'")
ITEMS = '{"input": [{"type": "reasoning", "content": text} for text in [large] + [""] * parts]}'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", TEXTS),
        ("/v1/messages", THOUGHTS),
        ("/v1/messages/count_tokens", TEXTS),
        ("/v1/responses", ITEMS),
        ("/v1/chat/completions", TEXTS),
    ],
    ids=["texts", "thoughts", "counted texts", "items", "parts"],
)
def test_a_text_in_many_parts_is_kept_once(path: str, body: str) -> None:
    code = CHILD.replace("PATH", repr(path)).replace("BODY", body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True\n"
