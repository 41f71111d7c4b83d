"""Optax transforms over low-rank factors and pairs of factors, and which leaves form a pair.

Each `scale_by_…` transform replaces gradients by preconditioned ones. The aliases are chained from
these: `scaled_gd`, `precgd`, `lora_p`, `nora_plus`, `reflora`, `reflora_s`. `lora_plus` gives the
factors of a pair different learning rates, and `lora_rite` is an optimizer. All transforms are also
in `nyscaled`.
"""

from nyscaled.transforms.balance import (
    ScaleByBalanceState,
    reflora,
    reflora_s,
    scale_by_balance,
)
from nyscaled.transforms.gram import lora_p, scale_by_gram, scaled_gd
from nyscaled.transforms.normalized import (
    ScaleByNormalizedGramState,
    nora_plus,
    scale_by_normalized_gram,
)
from nyscaled.transforms.pairing import FactorSpec, default_spec, pair_spec
from nyscaled.transforms.pinv import ScaleByGramPinvState, scale_by_gram_pinv
from nyscaled.transforms.plus import lora_plus
from nyscaled.transforms.residual import precgd, scale_by_residual_gram
from nyscaled.transforms.rite import ScaleByRiteState, lora_rite, scale_by_rite

__all__ = [
    "FactorSpec",
    "ScaleByBalanceState",
    "ScaleByGramPinvState",
    "ScaleByNormalizedGramState",
    "ScaleByRiteState",
    "default_spec",
    "lora_p",
    "lora_plus",
    "lora_rite",
    "nora_plus",
    "pair_spec",
    "precgd",
    "reflora",
    "reflora_s",
    "scale_by_balance",
    "scale_by_gram",
    "scale_by_gram_pinv",
    "scale_by_normalized_gram",
    "scale_by_residual_gram",
    "scale_by_rite",
    "scaled_gd",
]
