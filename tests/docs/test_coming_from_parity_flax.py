"""Rows of docs/coming_from/flax.md against transformers 5: its torch GPT-2 has the arguments that its Flax one had."""

import bridge
import coming_from
import jax
import numpy as np
import numpy_activations as naive
import pytest
from tiny_models import CONFIG

import gpt2_jax

pytestmark = pytest.mark.parity

BOUND = 1e-5  # of the largest value; measured: 5e-7
TOKENS = [[0, 3, 11, 5, 3, 11], [0, 7, 1, 30, 7, 2]]
FLAX = {row.theirs: row for row in coming_from.rows("flax")}


@pytest.fixture(scope="module")
def tokens(torch):
    return torch.tensor(TOKENS)


def close(ours, theirs):
    return naive.error(ours, theirs.detach().numpy()) < BOUND


@pytest.fixture(scope="module")
def hf(torch, params):
    return bridge.torch_model(CONFIG, params)


@pytest.fixture
def flax(params):
    """Run the code of a row of the Flax page."""
    names = {"config": CONFIG, "params": params, "tokens": np.array(TOKENS), "prompts": TOKENS}
    return lambda theirs, **more: FLAX[theirs].run(**(names | more))


def test_forward_of_torch(hf, flax, tokens):
    out = hf(tokens, output_hidden_states=True, output_attentions=True)
    assert close(flax("model(input_ids).logits"), out.logits)
    hidden = flax("output_hidden_states=True")
    assert len(hidden) == len(out.hidden_states) == CONFIG.n_layer + 1
    assert all(map(close, hidden.values(), out.hidden_states))
    assert all(map(close, flax("output_attentions=True").values(), out.attentions))
    last = flax("FlaxGPT2Model(...)(input_ids).last_hidden_state")
    assert close(last, hf.transformer(tokens).last_hidden_state)


def test_padding_of_torch(hf, flax, tokens, torch):
    """With position_ids that count the real tokens, theirs are our logits; with 0, 1, ... they are others."""
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    ours = flax("attention_mask=mask", mask=mask.astype(bool))
    given = torch.tensor(mask)
    counted = hf(tokens, attention_mask=given, position_ids=(given.cumsum(-1) - 1).clamp(min=0)).logits.numpy()
    plain = hf(tokens, attention_mask=given, position_ids=torch.arange(6)[None].expand(2, 6)).logits.numpy()
    real = mask.astype(bool)
    assert naive.error(np.asarray(ours)[real], counted[real]) < BOUND
    assert naive.error(plain[real], counted[real]) > 1e-3


def test_generation_of_torch(hf, flax, tokens, torch):
    new = hf.generate(tokens, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(tokens), pad_token_id=0)
    assert flax("model.generate(input_ids, max_new_tokens=8)") == new[:, len(TOKENS[0]) :].tolist()


def test_top_p_of_torch(hf, flax, torch):
    """Every token that the row draws is one that their top-p leaves, and now and then the one that crosses p."""
    from transformers.generation.logits_process import TopPLogitsWarper

    warper, crossing = TopPLogitsWarper(0.9), 0
    for prompt, row in zip(TOKENS, flax("top_p=0.9"), strict=True):
        logits = hf(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1]
        kept = warper(None, logits).isfinite()
        assert kept[torch.arange(len(row)), torch.tensor(row)].all()
        crossing += int((~kept).sum() > 0)
    assert crossing == len(TOKENS)


def test_save_and_load_of_torch(hf, flax, torch, tmp_path, params, shakespeare, tokenizer, reference):
    """Their save_pretrained is what our load reads, and our save what their from_pretrained opens."""
    import transformers

    hf.save_pretrained(tmp_path / "theirs")
    known = flax("from_pretrained(folder)", folder=tmp_path / "theirs")
    for ours, expected in zip(jax.tree.leaves(known["params"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, expected)
    config, weights = shakespeare
    save = {"folder": tmp_path / "ours", "config": config, "params": weights, "tokenizer": tokenizer}
    flax("model.save_pretrained(folder)", **save)
    opened = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = opened(torch.tensor(reference["tokens"][:1, :40].astype(np.int64))).logits
    assert close(gpt2_jax.GPT2(config).apply({"params": weights}, reference["tokens"][:1, :40]).logits, theirs)
    text = "a<|endoftext|>b"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")(text)["input_ids"]
    assert flax("tokenizer(text)", tokenizer=tokenizer, text=text) == theirs
