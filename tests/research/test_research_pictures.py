import matplotlib.image
import numpy as np
import pytest

from gpt2_jax import research
from gpt2_jax.research import pictures


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_tokens_are_written_so_that_they_can_be_seen(tokenizer):
    text = "Who's there?\n\tNay $5_x 中"
    ids = tokenizer.encode(text)
    written = pictures.token_labels(tokenizer, ids)
    assert len(written) == len(ids)
    joined = "".join(written)
    assert joined.startswith("Who's·there?⏎⇥Nay·$5_x·")
    assert joined.endswith(r"\xe4\xb8\xad")  # three tokens, none of them a character


def test_a_character_that_the_font_lacks_is_written_as_its_number():
    assert pictures._visible("中é") == r"\u4e2dé"


def test_a_heat_map_has_the_labels_and_the_numbers():
    values = np.array([[1.0, -2.0, np.nan], [0.0, 0.5, 3.0]])
    figure = pictures.heat_map(values, ["a", "$b"], ["x", "y_1^", "z"], title="t", row_name="r", value_name="v")
    square, bar = figure.axes
    assert labels(square.yaxis) == ["a", "$b"]
    assert labels(square.xaxis) == ["x", "y_1^", "z"]
    np.testing.assert_array_equal(square.images[0].get_array(), np.ma.masked_invalid(values))
    assert square.images[0].get_clim() == (-3, 3)  # numbers of both signs: 0 is white
    assert (square.get_title(), square.get_ylabel(), bar.get_ylabel()) == ("t", "r", "v")


def test_a_heat_map_of_one_sign_begins_at_zero():
    assert pictures.heat_map([[0.25, 0.5]]).axes[0].images[0].get_clim() == (0, 0.5)
    assert pictures.heat_map([[np.nan]]).axes[0].images[0].get_clim() == (0, 1)


def test_patterns_have_a_square_a_head_and_hide_what_nobody_may_see(shakespeare, tokenizer):
    ids = tokenizer.encode("O Romeo, Romeo!")
    _, seen = research.forward(*shakespeare, [ids], capture="h1/attn/pattern")
    pattern = seen["h1/attn/pattern"][0][:3]
    figure = pictures.attention_patterns(pattern, pictures.token_labels(tokenizer, ids), heads=[0, 1, 2])
    squares = [axes for axes in figure.axes if axes.get_title().startswith("head")]
    assert [square.get_title() for square in squares] == ["head 0", "head 1", "head 2"]
    shown = squares[2].images[0].get_array()
    np.testing.assert_allclose(shown.filled(0), pattern[2])
    assert shown.mask[0, 1]
    assert not shown.mask[1, 0]


def test_a_lens_is_drawn_with_the_last_layer_on_top(shakespeare, tokenizer):
    config, params = shakespeare
    ids = tokenizer.encode("First Citizen")
    lens = research.logit_lens(config, params, [ids])
    square = pictures.lens_picture(lens, tokenizer, ids).axes[0]
    assert labels(square.yaxis)[0] == f"h{config.n_layer - 1}/resid_post"
    top = [text.get_text() for text in square.texts[: len(ids)]]
    assert top == pictures.token_labels(tokenizer, lens.ids[-1, 0, :, 0])


def test_bars_are_the_largest_first():
    axes = pictures.bars(["a", "b", "c"], [1.0, -3.0, 2.0], most=2).axes[0]
    assert labels(axes.yaxis) == ["b", "c"]
    assert [bar.get_width() for bar in axes.patches] == [-3, 2]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    figure = pictures.heat_map([[0.0, 1.0]])
    pictures.save(figure, tmp_path / "map.PNG")
    assert matplotlib.image.imread(tmp_path / "map.PNG", format="png").ndim == 3
    with pytest.raises(ValueError, match=r"must end in \.png"):
        pictures.save(figure, tmp_path / "map.jpg")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pictures.save(figure, tmp_path / "absent" / "map.png")
    assert [path.name for path in tmp_path.iterdir()] == ["map.PNG"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: pictures.heat_map([1.0]), "rows, columns"),
        (lambda: pictures.heat_map(np.ones((2, 0))), r"rows, columns\], not \(2, 0\)"),
        (lambda: pictures.heat_map([[1.0]], rows=["a", "b"]), "1 rows, but 2 labels"),
        (lambda: pictures.attention_patterns(np.ones((2, 2)), "ab"), r"\[N, T, T\]"),
        (lambda: pictures.attention_patterns(np.ones((1, 2, 2)), "ab", heads=[1, 2]), "1 patterns, but 2"),
        (lambda: pictures.attention_patterns(np.ones((1, 2, 2)), "abc"), "2 rows, but 3 labels"),
        (lambda: pictures.attention_patterns(np.ones((0, 2, 2)), "ab"), "0 patterns, but 0"),
        (lambda: pictures.bars(["a"], [1.0, 2.0]), "1 labels"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_large_pictures_keep_a_size_that_can_be_looked_at():
    figure = pictures.attention_patterns(np.zeros((5, 1031, 1031)), range(1031))
    assert max(figure.get_size_inches()) < 40
    assert labels(figure.axes[0].xaxis)[:3] == ["0", "17", "34"]
    assert max(pictures.heat_map(np.zeros((12, 2053))).get_size_inches()) < 20


def test_a_folder_is_no_picture(tmp_path):
    (tmp_path / "map.png").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        pictures.save(pictures.heat_map([[0.0, 1.0]]), tmp_path / "map.png")
