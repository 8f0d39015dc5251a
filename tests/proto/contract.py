"""The contract as its descriptors say it."""

import importlib
from pathlib import Path

from google.protobuf.descriptor import FileDescriptor

import loraplex.v1

FILES: list[FileDescriptor] = [
    importlib.import_module(f"loraplex.v1.{path.stem}").DESCRIPTOR
    for path in sorted(Path(loraplex.v1.__path__[0]).glob("*_pb2.py"))
]
