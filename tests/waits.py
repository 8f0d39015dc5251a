"""How long tests wait for what comes at once. It only ends a test of which something never comes."""

from typing import Final

MOST_SECONDS: Final = 120.0  # on any machine, beside whatever else runs there
