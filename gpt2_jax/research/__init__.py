"""Look inside GPT-2 and change it: read activations, edit a forward pass, edit weights, and analyze what they do.

This package holds published methods that work on one model's activations and weights, with their sources, and
functions that draw the results. The activation names and the edits are part of the model (`gpt2_jax.activations`,
`gpt2_jax.edits`), because generation and evaluation take edits too. `gpt2_jax.evaluate` measures how good a model is.
"""

from gpt2_jax.activations import AXES, BRANCHES, activation_names
from gpt2_jax.edits import Edit, add, patch, replace, scale
from gpt2_jax.research import pictures, surgery
from gpt2_jax.research._forward import forward
from gpt2_jax.research._harvest import harvest
from gpt2_jax.research._rows import padded
from gpt2_jax.research.attribution import logit_attribution, residual_parts
from gpt2_jax.research.circuits import composition_scores, copying_scores, ov_circuit, qk_circuit, top_tokens
from gpt2_jax.research.erasure import Eraser, leace
from gpt2_jax.research.folding import (
    center_reading_weights,
    center_unembed,
    center_writing_weights,
    centered_stream,
    fold_layer_norm,
    fold_value_biases,
    process_weights,
    unembedding,
    untie_head,
)
from gpt2_jax.research.heads import head_scores, mean_attention, repeated_tokens
from gpt2_jax.research.lens import Translators, logit_lens, stream_logits
from gpt2_jax.research.metrics import answer_probability, logit_difference
from gpt2_jax.research.patching import activation_patching, attribution_patching
from gpt2_jax.research.probes import Probe, linear_probe
from gpt2_jax.research.stored import StoredActivations, open_activations
from gpt2_jax.research.tracing import CausalTrace, attention_knockout, causal_tracing
from gpt2_jax.research.tuned_lens import identity_translators, train_tuned_lens

__all__ = [
    "AXES",
    "BRANCHES",
    "CausalTrace",
    "Edit",
    "Eraser",
    "Probe",
    "StoredActivations",
    "Translators",
    "activation_names",
    "activation_patching",
    "add",
    "answer_probability",
    "attention_knockout",
    "attribution_patching",
    "causal_tracing",
    "center_reading_weights",
    "center_unembed",
    "center_writing_weights",
    "centered_stream",
    "composition_scores",
    "copying_scores",
    "fold_layer_norm",
    "fold_value_biases",
    "forward",
    "harvest",
    "head_scores",
    "identity_translators",
    "leace",
    "linear_probe",
    "logit_attribution",
    "logit_difference",
    "logit_lens",
    "mean_attention",
    "open_activations",
    "ov_circuit",
    "padded",
    "patch",
    "pictures",
    "process_weights",
    "qk_circuit",
    "repeated_tokens",
    "replace",
    "residual_parts",
    "scale",
    "stream_logits",
    "surgery",
    "top_tokens",
    "train_tuned_lens",
    "unembedding",
    "untie_head",
]
