"""Forms whose config.json changes the arithmetic: variants that are fields of the config, and other models."""

import json

import numpy as np
import wild_model
from wild_model import CONFIG, hf_tensors, source
from wild_table import weights
from wild_weights import PARITY, write


def variant(name: str, writer: str, fields: dict, transformers: bool = True, **arithmetic) -> None:
    """Add a row for a config that transformers writes."""

    @weights(name, writer, transformers=transformers, needs=PARITY)
    def make(folder):
        model = source(**arithmetic)
        wild_model.torch_model(model, **fields).save_pretrained(folder)
        return model


for activation in ("gelu", "relu", "silu"):
    variant(
        f"activation-{activation}",
        f'transformers 5, `activation_function="{activation}"`',
        {"activation_function": activation},
        activation=activation,
    )
ALIASES = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
    "swish": "silu",
}
for alias, same in ALIASES.items():
    variant(
        f"activation-{alias}",
        f"transformers 5, another name of `{same}`",
        {"activation_function": alias},
        activation=same,
    )
variant(
    "inverse-layer",
    "BioMedLM: `scale_attn_by_inverse_layer_idx`",
    {"scale_attn_by_inverse_layer_idx": True},
    by_layer=True,
)
variant("reorder-and-upcast", "`reorder_and_upcast_attn`", {"reorder_and_upcast_attn": True})
variant(
    "stanford-crfm",
    "stanford-crfm/mistral and CodeParrot: both of these fields",
    {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    by_layer=True,
)
variant(
    "untied-head",
    "transformers 5, `tie_word_embeddings=False`",
    {"tie_word_embeddings": False},
    head=wild_model.another_head(),
)


@weights(
    "another-head-stored",
    "a head of its own, without `tie_word_embeddings`: transformers 5 keeps it",
    transformers=True,
)
def another_head_stored(folder):
    head = wild_model.another_head()
    write(folder, source().flat, hf_tensors(source().flat) | {"lm_head.weight": head})
    return source(head=head)


def spelled(name: str, writer: str, transformers: bool = True, **fields) -> None:
    """Add a row for another spelling of the same config."""

    @weights(name, writer, transformers=transformers)
    def make(folder):
        write(folder, source().flat, hf_tensors(source().flat), **fields)
        return source()


spelled(
    "hidden_size-names",
    "configs with `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `max_position_embeddings`",
    n_embd=...,
    n_layer=...,
    n_head=...,
    n_positions=...,
    n_ctx=...,
    hidden_size=CONFIG.n_embd,
    num_hidden_layers=CONFIG.n_layer,
    num_attention_heads=CONFIG.n_head,
    max_position_embeddings=CONFIG.n_ctx,
)
spelled("n_ctx-of-another-length", "`n_ctx` beside `n_positions`: only `n_positions` counts", n_ctx=7)
spelled("several-eos", "`eos_token_id` as a list", eos_token_id=[1, 2])
spelled("n_inner-of-GPT-2", "`n_inner` written out as 4 · `n_embd`", n_inner=4 * CONFIG.n_embd)
spelled("fields-of-others", "fields that GPT-2 does not have: `rotary`, `window_size`", rotary=False, window_size=256)


# ---- other models: refused, and the field is named


def another_model(name: str, writer: str, refused: str, names: str, transformers: bool = True, **fields) -> None:
    @weights(name, writer, transformers=transformers, refused=refused, names=names)
    def make(folder):
        write(folder, source().flat, hf_tensors(source().flat), **fields)


another_model(
    "epsilon",
    "another `layer_norm_epsilon`, such as `1e-6`",
    r"config\.json.*layer_norm_epsilon",
    "`layer_norm_epsilon`",
    layer_norm_epsilon=1e-6,
)
another_model(
    "unscaled-attention",
    "`scale_attn_weights: false`",
    r"config\.json.*scale_attn_weights",
    "`scale_attn_weights`",
    scale_attn_weights=False,
)
another_model(
    "activation-tanh",
    '`activation_function: "tanh"`',
    r"config\.json.*activation_function",
    "`activation_function`",
    activation_function="tanh",
)
another_model(
    "activation-quick_gelu",
    '`activation_function: "quick_gelu"`',
    r"config\.json.*activation_function",
    "`activation_function`",
    activation_function="quick_gelu",
)
another_model(
    "untied-without-head",
    "`tie_word_embeddings: false`, and no head is stored",
    r"lm_head",
    "`lm_head`",
    transformers=False,
    tie_word_embeddings=False,
)


def save_by_transformers(folder, **fields) -> None:
    import transformers

    fields = wild_model.hf_fields(source().flat, n_ctx=..., **fields)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).save_pretrained(folder)


@weights(
    "n_inner",
    "another width of the MLP",
    transformers=True,
    needs=PARITY,
    refused=r"config\.json.*n_inner",
    names="`n_inner`",
)
def n_inner(folder):
    save_by_transformers(folder, n_inner=56)


@weights(
    "cross-attention",
    "an encoder-decoder's GPT-2, `add_cross_attention`",
    transformers=True,
    needs=PARITY,
    refused=r"config\.json.*add_cross_attention",
    names="`add_cross_attention`",
)
def cross_attention(folder):
    save_by_transformers(folder, add_cross_attention=True)


@weights(
    "GPT-Neo",
    "transformers 5, another architecture",
    transformers=False,
    needs=PARITY,
    refused=r"config\.json.*model_type",
    names="`model_type`",
)
def gpt_neo(folder):
    import transformers

    fields = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 3, "hidden_size": 24}
    config = transformers.GPTNeoConfig(vocab_size=97, max_position_embeddings=32, **fields)
    transformers.GPTNeoForCausalLM(config).save_pretrained(folder)


@weights(
    "quantized",
    "a bitsandbytes model in 8 bits",
    transformers=False,
    refused=r"config\.json.*quantization_config",
    names="`quantization_config`",
)
def quantized(folder):
    tensors = {name: array.astype(np.int8) if array.ndim == 2 else array for name, array in source().flat.items()}
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    write(folder, source().flat, hf_tensors(tensors), quantization_config=quantization)


def write_adapter(folder, **changed):
    """Write an adapter of rank 2 whose b is 0, of a base model in a folder beside."""
    import safetensors.numpy

    (folder / "base").mkdir()
    write(folder / "base", source().flat, hf_tensors(source().flat))
    name = "base_model.model.transformer.h.0.attn.c_attn"
    factors = {f"{name}.lora_A.weight": np.ones((2, 24), "f4"), f"{name}.lora_B.weight": np.zeros((72, 2), "f4")}
    safetensors.numpy.save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "base"), "r": 2, "fan_in_fan_out": True}
    fields |= {"task_type": "CAUSAL_LM", "target_modules": ["h.0.attn.c_attn"]} | changed
    (folder / "adapter_config.json").write_text(json.dumps(fields))


@weights(
    "peft-adapter",
    "peft, `save_pretrained` of an adapter that is not merged",
    transformers=True,
    needs=("peft",),
)
def peft_adapter(folder):
    write_adapter(folder)
    return source()


@weights(
    "peft-DoRA",
    "peft, an adapter of another method than LoRA",
    transformers=False,
    refused=r"adapter_config\.json has use_dora",
    names="`use_dora`",
)
def peft_dora(folder):
    write_adapter(folder, use_dora=True)


@weights(
    "peft-not-merged",
    "the state dict of a peft model that is not merged: `base_layer`, `lora_A`, `lora_B`",
    transformers=False,
    refused=r"lora_A|base_layer",
    names="the names of LoRA",
)
def peft_not_merged(folder):
    tensors = {f"base_model.model.{name}": array for name, array in hf_tensors(source().flat).items()}
    for name in [name for name in tensors if ".c_attn." in name]:
        tensors[name.replace("c_attn.", "c_attn.base_layer.")] = tensors.pop(name)
    for i in range(CONFIG.n_layer):
        name = f"base_model.model.transformer.h.{i}.attn.c_attn"
        tensors[f"{name}.lora_A.default.weight"] = np.ones((2, 24), np.float32)
        tensors[f"{name}.lora_B.default.weight"] = np.ones((72, 2), np.float32)
    write(folder, source().flat, tensors)
