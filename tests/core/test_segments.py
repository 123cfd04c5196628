"""Several texts in a row: each gives what it gives alone, in logits and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import GPT2, GPT2Config
from gpt2_jax.data.example_batches import PackedRows, PaddedRows, documents_of, padding_share
from gpt2_jax.data.examples import Examples
from gpt2_jax.data.packing import pack, parts_of
from gpt2_jax.data.token_files import Tokens
from gpt2_jax.model import init_params

CONFIG = GPT2Config(31, 12, 16, 2, 2, param_dtype="float64", compute_dtype="float64")
TEXTS = [[4, 9, 2, 7, 7], [3, 1], [8, 8, 30, 0, 5, 6, 2]]  # 14 tokens: more than n_ctx, which each text fits


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def nats(params, tokens_BT, target_BT, weight_BT, segments_BT=None):
    how = {"method": "hidden", "segments_BT": segments_BT}
    h_BTD, _ = GPT2(CONFIG).apply({"params": params}, tokens_BT, **how)
    log_p_BTV = jax.nn.log_softmax(h_BTD @ params["wte"].T)
    return -(weight_BT * jnp.take_along_axis(log_p_BTV, target_BT[..., None], axis=-1)[..., 0]).sum()


def test_each_text_gives_the_logits_and_the_gradients_that_it_gives_alone():
    params = init_params(CONFIG, jax.random.key(0))
    tokens_BT = jnp.asarray([[*itertools.chain(*TEXTS), 13, 13]])  # two tokens of padding
    segments_BT = jnp.asarray([[1] * 5 + [2] * 2 + [3] * 7 + [0] * 2])
    model = GPT2(CONFIG)
    h_BTD, _ = model.apply({"params": params}, tokens_BT, method="hidden", segments_BT=segments_BT)
    alone = [model.apply({"params": params}, jnp.asarray([text]), method="hidden")[0][0] for text in TEXTS]
    np.testing.assert_allclose(h_BTD[0, :14], jnp.concatenate(alone), rtol=0, atol=1e-13)  # measured: 9e-16

    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    weights_BT = jnp.asarray([[1.0] * 4 + [0] + [1] + [0] + [1] * 6 + [0] * 3])
    grads = jax.grad(nats)(params, tokens_BT, targets_BT, weights_BT, segments_BT)
    summed = jax.tree.map(jnp.zeros_like, params)
    for text in TEXTS:
        one = jnp.asarray([text])
        parts = jax.grad(nats)(params, one[:, :-1], one[:, 1:], jnp.ones((1, len(text) - 1)))
        summed = jax.tree.map(jnp.add, summed, parts)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)  # measured: 4e-15


def test_segments_replace_a_mask():
    params = init_params(CONFIG, jax.random.key(0))
    tokens_BT = jnp.asarray([TEXTS[0]])
    with pytest.raises(ValueError, match="segments_BT replaces mask_BT"):
        GPT2(CONFIG).apply({"params": params}, tokens_BT, tokens_BT > 0, method="hidden", segments_BT=tokens_BT)


def test_taps_see_the_positions_within_a_text():
    params, seen = init_params(CONFIG, jax.random.key(0)), []
    how = {"method": "hidden", "segments_BT": jnp.asarray([[1, 1, 1, 2, 2, 0]])}
    taps = {"embed": lambda value, position_BT: seen.append(position_BT)}
    GPT2(CONFIG).apply({"params": params}, jnp.asarray([[4, 9, 2, 7, 7, 1]]), taps=taps, **how)
    assert np.asarray(seen[0]).tolist() == [[0, 1, 2, 0, 1, 0]]


# ---- packing


def test_bins_hold_every_item_once_and_are_those_of_best_fit():
    sizes = np.random.default_rng(0).integers(1, 65, 500).tolist()
    bins = pack(sizes, 64)
    assert sorted(item for one in bins for item in one) == list(range(500))
    rooms: list[int] = []  # best fit, by a search through all bins
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(64 - size)
    assert sorted(64 - sum(sizes[item] for item in one) for one in bins) == sorted(rooms)
    assert pack([3, 3, 2, 2, 2], 6) == [[0, 1], [2, 3, 4]]


def test_a_long_document_is_divided_so_that_each_target_is_predicted_once():
    assert parts_of(np.array([9, 1, 3]), 4, split=True) == [(0, 0, 5), (0, 4, 5), (2, 0, 3)]
    assert parts_of(np.array([9, 1, 3]), 4, split=False) == [(0, 0, 5), (2, 0, 3)]


def examples(tmp_path, texts, masks=None):
    path, mask_path = tmp_path / "train.bin", None
    np.concatenate(texts).astype("<u2").tofile(path)
    if masks:
        mask_path = tmp_path / "train.mask.bin"
        np.concatenate(masks).astype(np.uint8).tofile(mask_path)
    tokens = Tokens(path, sum(map(len, texts)), 31, mask_path)
    return Examples(tokens, np.cumsum([len(text) for text in texts]))


def test_packed_rows_hold_the_targets_of_the_padded_ones(tmp_path):
    masks = [[0, 0, 1, 1, 1], [0, 1], [0, 0, 0, 1, 1, 1, 1]]
    found = examples(tmp_path, TEXTS, masks)

    def arrays(row):
        return row.tokens, row.targets, row.weights

    def targets(rows):
        read = [rows.read(number) for number in range(len(rows))]
        return sorted((int(t), int(y)) for row in read for t, y, w in zip(*arrays(row), strict=True) if w)

    padded, packed = PaddedRows(found, 6), PackedRows(found, 6)
    assert targets(padded) == targets(packed)
    assert len(targets(packed)) == 3 + 1 + 4
    assert (len(padded), len(packed)) == (3, 2)
    assert padding_share(padded, 6) == pytest.approx(1 - 11 / 18)
    assert padding_share(packed, 6) == pytest.approx(1 - 11 / 12)
    row = packed.read(1)
    assert row.segments is not None
    assert row.segments.tolist() == [1, 1, 1, 1, 2, 0]
    assert row.tokens.tolist() == [4, 9, 2, 7, 3, 0]
    assert row.weights.tolist() == [0, 1, 1, 1, 1, 0]


def test_an_example_longer_than_a_row_is_counted(tmp_path):
    found = examples(tmp_path, TEXTS)
    assert (PaddedRows(found, 4).n_cut, PackedRows(found, 4).n_cut, PackedRows(found, 4, split=True).n_cut) == (1, 1, 0)
    assert PaddedRows(found, 6).n_cut == 0


def test_documents_end_after_the_end_of_text(tmp_path):
    np.array([5, 6, 30, 30, 7, 8], "<u2").tofile(tmp_path / "train.bin")
    tokens = Tokens(tmp_path / "train.bin", 6, 31)
    assert documents_of(tokens, 30).ends.tolist() == [3, 4, 6]
    assert documents_of(tokens, None).ends.tolist() == [6]
