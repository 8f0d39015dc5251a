"""The names of a checkpoint's tensors in a borrowed class: files of many years are spelt in several ways."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from loraplex_engine.checkpoint.model_config import NotBorrowedError
from loraplex_engine.checkpoint.weights import Names


def stored_names(model: Any, expected: Collection[str], where: str) -> Names:
    """From a stored name to the model's. NotBorrowedError: the class would rearrange it."""
    transforms = get_model_conversion_mapping(model)
    prefix = f"{model.base_model_prefix}."
    unused = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def name(stored: str) -> str | None:
        found = stored
        for transform in transforms:
            renamed, pattern = transform.rename_source_key(found)
            if pattern is not None and not isinstance(transform, WeightRenaming):
                raise NotBorrowedError(
                    f"{where}: {type(model).__name__} keeps {stored} in another layout, joined with others"
                )
            found = renamed
        for candidate in (found, prefix + found, found.removeprefix(prefix)):
            if candidate in expected:
                return candidate
        return None if any(pattern.search(found) for pattern in unused) else found

    return name
