"""The linears of a loaded model, by their sites."""

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_engine.models import LanguageModel


def linear_at(model: LanguageModel, site: str) -> LoRALinear:
    """The linear of this site, which must be one."""
    found = model.lora_sites()[site]
    assert isinstance(found, LoRALinear)
    return found
