"""Sparse autoencoders and transcoders: their files, their place in a model, and their features."""

from transformer_lens.dictionaries.cross_layer import CrossLayerTranscoder, load_cross_layer
from transformer_lens.dictionaries.dictionary import Dictionary, load_dictionary
from transformer_lens.dictionaries.features import feature_attribution, feature_logits, measure, top_contexts
from transformer_lens.dictionaries.page import feature_page

__all__ = [
    "CrossLayerTranscoder",
    "Dictionary",
    "feature_attribution",
    "feature_logits",
    "feature_page",
    "load_cross_layer",
    "load_dictionary",
    "measure",
    "top_contexts",
]
