"""Argument checks: accepted values, what is returned for them, and the sentence for a rejected value."""

import decimal
import re

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.checks import choice, real_number, whole_number


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7), np.array(7), jnp.int32(7)])
def test_whole_numbers_of_every_kind_come_back_as_ints(value):
    number = whole_number("n", value, 7, 7)
    assert type(number) is int
    assert number == 7


@pytest.mark.parametrize(
    "value", [True, np.True_, jnp.bool_(True), np.array(True), 1.0, np.float32(1), "1", None, [1], np.array([1, 1]), 1j]
)
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match=r"^n must be a whole number, 0 or more, not "):
        whole_number("n", value)


@pytest.mark.parametrize(
    ("low", "high", "value", "text"),
    [
        (1, float("inf"), 0, "n must be a whole number, 1 or more, not 0"),
        (0, 4, 5, "n must be a whole number, from 0 to 4, not 5"),
        (0, 4, -1, "n must be a whole number, from 0 to 4, not -1"),
        (0, 2**31 - 1, 2**70, f"n must be a whole number, from 0 to 2147483647, not {2**70}"),
        (-float("inf"), 3, 4, "n must be a whole number, at most 3, not 4"),
    ],
)
def test_whole_numbers_out_of_range(low, high, value, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        whole_number("n", value, low, high)


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float32(0.5), jnp.float32(0.5), decimal.Decimal("0.5")])
def test_numbers_of_every_kind_come_back_as_floats(value):
    number = real_number("x", value, 0, 1)
    assert type(number) is float
    assert number == 0.5
    assert type(real_number("x", 1)) is float


@pytest.mark.parametrize(
    "value", [True, np.False_, jnp.bool_(True), "0.5", b"1", None, [0.5], 1j, float("nan"), float("inf"), 10**400]
)
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match=r"^x must be a finite number, not "):
        real_number("x", value)


@pytest.mark.parametrize(
    ("value", "low", "high", "ends", "text"),
    [
        (-0.1, 0, float("inf"), {}, "x must be a number, 0 or more, not -0.1"),
        (1.5, 0, 1, {}, "x must be a number, from 0 to 1, not 1.5"),
        (1, 0, 1, {"open_high": True}, "x must be a number, 0 or more and below 1, not 1"),
        (0, 0, 1, {"open_low": True}, "x must be a number, above 0 and at most 1, not 0"),
        (0.0, 0, float("inf"), {"open_low": True}, "x must be a number, above 0, not 0.0"),
    ],
)
def test_numbers_out_of_range(value, low, high, ends, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        real_number("x", value, low, high, **ends)


def test_the_ends_of_a_range_belong_to_it_unless_open():
    assert [real_number("x", end, 0, 1) for end in (0, 1)] == [0.0, 1.0]
    assert real_number("x", 0, 0, 1, open_high=True) == 0.0
    assert real_number("x", 1, 0, 1, open_low=True) == 1.0


def test_one_of_some_words():
    assert choice("split", "tail", ("auto", "tail")) == "tail"
    for wrong in ("Tail", "", None, ["tail"], 3):
        with pytest.raises(ValueError, match=re.escape(f"split must be one of auto, tail, not {wrong!r}") + "$"):
            choice("split", wrong, {"auto": 1, "tail": 2})
