"""Pure functions from states to values, one file per family of metrics."""

from repflow.monitor.functional.adjacent import adjacent_layer_similarity
from repflow.monitor.functional.cka import layer_cka
from repflow.monitor.functional.inter_token import inter_token_similarity
from repflow.monitor.functional.variation import layer_global_variance, layer_local_variance

__all__ = [
    "adjacent_layer_similarity",
    "inter_token_similarity",
    "layer_cka",
    "layer_global_variance",
    "layer_local_variance",
]
