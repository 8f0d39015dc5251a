"""Finds a model's files: a directory, a GGUF file, or a repository of the hub, which is downloaded if need be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraplex_adapters.files.gguf import SUFFIX, GGUFError, hub_parts, parts_of
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.link.load_report import UNREPORTED, LoadReport

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt")
# Other layouts of the same weights, in some repositories: never what we read. sentence-transformers numbers the folders
# of what comes after the model: "1_Pooling".
HUB_FILES_LEFT_OUT = ("[!0-9]*/*", "consolidated*")
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
MAX_LISTED = 8  # files named in one error; the rest are counted


def resolve_model(model: str, revision: str | None = None, report: LoadReport = UNREPORTED) -> Path:
    """The directory of a model, or its GGUF file: `model` itself if it is one, else of that hub id (downloaded if need
    be), which the name of a file may follow. While a download gets on, the report is told.

    Raises ModelError if it is neither, or cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            _check_no_file_is_meant(f"model {model!r}", [each.name for each in path.iterdir()])
        return path
    if path.suffix == SUFFIX and path.is_file():
        return path
    repository, file = hub_parts(model)
    if not HUB_ID.fullmatch(repository):
        raise ModelError(
            f"model {model!r}: no such directory, and not of the form of a hub id (owner/name), nor a GGUF file here "
            f"(FILE{SUFFIX}) or there (owner/name/FILE{SUFFIX})"
        )
    from huggingface_hub import snapshot_download  # only where it is needed: it takes a third of a second to import
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    at = f"model {model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(HUB_FILES) if file is None else [str(part) for part in _parts(file)],
            ignore_patterns=list(HUB_FILES_LEFT_OUT) if file is None else None,
            tqdm_class=_reporting(report, f"the download of {repository}"),
        )
    except GatedRepoError as error:
        raise ModelError(f"{at}: access is gated: accept its licence on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{at}: the hub has the model, but not this revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{at}: no such directory, and no such model on the hub (or a private one: HF_TOKEN)"
        ) from error
    except Exception as error:  # no connection, offline mode, no space: each of its versions raises others
        raise ModelError(
            f"{at}: no such directory, not in the local hub cache, and it could not be downloaded: {error}. "
            "Give the path of a local directory, or fetch it where there is a network and share HF_HOME"
        ) from error
    if file is None and not (Path(found) / "config.json").exists():
        _check_no_file_is_meant(at, _files_of(repository, revision))
    if file is not None and not (Path(found) / file).is_file():
        raise ModelError(f"{at}: the repository has no file {file}")
    return Path(found) if file is None else Path(found) / file


def _reporting(report: LoadReport, what: str) -> Any:
    """A bar of the hub's library that tells the report of whatever has arrived."""
    from huggingface_hub.utils.tqdm import tqdm  # only where it is needed, as above

    class Reporting(tqdm):
        def update(self, n: float | None = 1) -> Any:
            if n:
                report.waits(what)
            return super().update(n)

    return Reporting


def _check_no_file_is_meant(model: str, files: Iterable[str]) -> None:
    """Raise ModelError where there are GGUF files in place of config.json, one of which must be named."""
    found = sorted(name for name in files if name.endswith(SUFFIX))
    if found:
        more = f" and {len(found) - MAX_LISTED} others" if len(found) > MAX_LISTED else ""
        raise ModelError(
            f"{model}: holds no config.json, but the GGUF files {', '.join(found[:MAX_LISTED])}{more}: name one of "
            "them behind it, as in owner/name/FILE.gguf or directory/FILE.gguf"
        )


def _files_of(repository: str, revision: str | None) -> list[str]:
    """The names of a repository's files; none where the hub cannot be asked."""
    from huggingface_hub import list_repo_files  # only where it is needed, as above

    try:
        return list_repo_files(repository, revision=revision)
    except Exception:  # offline, or the model is in the cache alone: what is missing is said when it is read
        return []


def _parts(file: str) -> list[Path]:
    try:
        return parts_of(Path(file))
    except GGUFError as error:
        raise ModelError(f"{file}: {error}") from None
