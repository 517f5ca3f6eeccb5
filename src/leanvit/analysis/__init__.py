"""Insight into a model: where its attention goes, what its tokens keep apart, and what a resolution costs.

Each module is one measure, usable alone on any torch model that it fits; `study` runs them on one model or two.
"""

from leanvit.analysis.alpha import learned_alpha
from leanvit.analysis.attention import AttentionLayer, attention_layers, received_attention
from leanvit.analysis.cost import cost_at
from leanvit.analysis.distance import attention_distance, uniform_distance
from leanvit.analysis.diversity import layer_tokens, rank_one_residual, token_diversity
from leanvit.analysis.field import area_share, effective_field, last_map
from leanvit.analysis.rollout import attention_rollout, rollout_map
from leanvit.analysis.shortcut import shortcut_ablation
from leanvit.quant.sinks import norm_facts, token_norms

__all__ = [
    "AttentionLayer",
    "area_share",
    "attention_distance",
    "attention_layers",
    "attention_rollout",
    "cost_at",
    "effective_field",
    "last_map",
    "layer_tokens",
    "learned_alpha",
    "norm_facts",
    "rank_one_residual",
    "received_attention",
    "rollout_map",
    "shortcut_ablation",
    "token_diversity",
    "token_norms",
    "uniform_distance",
]
