"""TransformerLens's bridge around the weights of one of our models, in the same dtype and unprocessed."""

import jax
import numpy as np
import pytest

REASON = "needs transformer-lens, of the `parity` extra: pip install -e '.[parity]'"
LEAVES = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
VARIANTS = ("activation_function", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings")
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "ln_1/scale": "ln1.hook_scale",
    "ln_1/normalized": "ln1.hook_normalized",
    "ln_1/out": "ln1.hook_out",
    "attn/q": "attn.hook_q",
    "attn/k": "attn.hook_k",
    "attn/v": "attn.hook_v",
    "attn/scores": "attn.hook_attn_scores",
    "attn/pattern": "attn.hook_pattern",
    "attn/z": "attn.hook_z",
    "attn/out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "ln_2/scale": "ln2.hook_scale",
    "ln_2/normalized": "ln2.hook_normalized",
    "ln_2/out": "ln2.hook_out",
    "mlp/pre": "mlp.hook_pre",
    "mlp/post": "mlp.hook_post",
    "mlp/out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
    # Computed only with set_use_attn_in, set_use_split_qkv_input, set_use_attn_result and set_use_hook_mlp_in.
    "attn/in": "attn.hook_attn_in",
    "attn/q_in": "attn.hook_q_input",
    "attn/k_in": "attn.hook_k_input",
    "attn/v_in": "attn.hook_v_input",
    "attn/result": "attn.hook_result",
    "mlp/in": "hook_mlp_in",
}


def bridge_of(config, params, tokenizer=None):
    """Return a TransformerBridge with these weights and compatibility mode off. Skip the test without the library.

    `tokenizer` is one of Hugging Face's. By default its words are ids, because the bridge would otherwise ask the hub.
    """
    pytest.importorskip("transformer_lens", reason=REASON)
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = words_of_ids(config.n_vocab) if tokenizer is None else tokenizer
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=torch_model(config, params), tokenizer=tokenizer)
    return bridge.requires_grad_(False)


def torch_model(config, params):
    """Return a GPT2LMHeadModel with these weights."""
    import torch
    import transformers

    hf_config = transformers.GPT2Config(
        vocab_size=config.n_vocab,
        n_positions=config.n_ctx,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_layer=config.n_layer,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        **{name: getattr(config, name) for name in VARIANTS},
    )
    model = transformers.GPT2LMHeadModel(hf_config).eval().requires_grad_(False)
    model.to(getattr(torch, config.param_dtype.name))
    theirs = dict(model.named_parameters())
    ours = by_torch_name(params)
    assert theirs.keys() == ours.keys()
    for name, parameter in theirs.items():
        assert parameter.shape == ours[name].shape
        parameter.copy_(torch.tensor(ours[name]))
    return model


def by_torch_name(tree):
    """Return the leaves of a params tree, or of a similar tree, by Hugging Face's names."""
    return {_torch_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _torch_name(path):
    """Return transformer.h.3.attn.c_attn.weight for h3/attn/c_attn/w. Both are (in, out)."""
    *modules, leaf = (entry.key for entry in path)
    if leaf == "lm_head":
        return "lm_head.weight"
    modules = [f"h.{name[1:]}" if name[0] == "h" else name for name in modules]
    return ".".join(["transformer", *modules, LEAVES[leaf]])


def words_of_ids(n_vocab):
    """Return a Hugging Face tokenizer that encodes "7 3" as the ids 7 and 3."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(n_vocab)}, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    # No bos_token: with one, the bridge would load the tokenizer again from its files. An unknown token has id 0.
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", unk_token="0")


def hook_of(name):
    """Return TransformerLens's name of an activation. All have the same axes as ours."""
    if name.startswith("h"):
        block, rest = name.split("/", 1)
        return f"blocks.{block[1:]}.{HOOKS[rest]}"
    return name.replace("ln_f/", "ln_final.hook_") if "/" in name else f"hook_{name}"


def values_and_gradients(bridge, tokens, names, loss):
    """Return {name: activation} and {name: gradient of loss(logits)}, by hooks, with our names of the activations."""
    found = {"fwd_hooks": {}, "bwd_hooks": {}}

    def keep(kind, name):
        return lambda x, hook: found[kind].update({name: x.detach().clone()})

    with bridge.hooks(**{kind: [(hook_of(name), keep(kind, name)) for name in names] for kind in found}):
        loss(bridge(tokens)).backward()
    for values in found.values():
        assert values.keys() == set(names)
    return found["fwd_hooks"], found["bwd_hooks"]


def as_torch(array):
    import torch

    return torch.tensor(np.array(array))
