"""Every tensor of an adapter is bound to a projection of the model, or the load fails."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A projection that an adapter may name, and where its output lies in the linear that computes it.

    A model describes itself by a dict of these, keyed by the projection's module path in the Hugging Face model
    ("model.layers.0.self_attn.q_proj"), with the fused names ("….self_attn.qkv_proj") beside the parts.
    """

    site: str  # the linear: a key of the pool's sites
    in_features: int  # C
    out_start: int  # first column of the linear's output that belongs to this projection
    out_features: int  # N of the projection
