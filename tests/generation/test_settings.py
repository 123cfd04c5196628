"""Settings is the only place of the sampling arguments: names, defaults, meanings and checks."""

import ast
import dataclasses
import inspect
import subprocess
import sys
import textwrap

import pytest
from tiny_models import CONFIG

import gpt2_jax
from gpt2_jax.generation import Settings, settings

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize(("function", "without"), [(gpt2_jax.generate, set()), (gpt2_jax.stream, {"logprobs"})])
def test_functions_take_all_settings_with_their_defaults(function, without):
    """Positional arguments are in the order of the fields, and types are the same."""
    parameters = inspect.signature(function).parameters
    taken = [name for name in parameters if name in FIELDS]
    assert set(taken) == FIELDS.keys() - without
    for name in taken:
        assert parameters[name].default == FIELDS[name].default
        assert parameters[name].annotation == FIELDS[name].type
    by_place = [name for name in taken if parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert by_place == list(FIELDS)[: len(by_place)] == ["max_new_tokens", "temperature", "top_k", "top_p", "seed"]
    assert "temperature: 'float' = 1.0" in str(inspect.signature(function))  # what help() shows
    assert all(name in inspect.getdoc(function) for name in taken)


def test_every_setting_is_described():
    """A string under each field describes it. The command's --help shows these strings."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(Settings))).body
    pairs = zip(body.body, body.body[1:], strict=False)
    described = [
        field.target.id
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    ]
    assert described == list(FIELDS)


def test_settings_are_found_among_other_arguments():
    assert Settings.among({"config": None, "top_k": 3, "seed": 5, "edits": ()}) == Settings(top_k=3, seed=5)


def test_choices_are_those_of_the_types():
    for name, words in (("top_p_rule", "original, common"), ("overflow", "error, slide")):
        for wrong in ("Error", "", None, 3, ["error"]):
            with pytest.raises(ValueError, match=f"^{name} must be one of {words}, not "):
                Settings(**{name: wrong}).check(CONFIG)


@pytest.mark.parametrize("value", [0, -1, 2**-127, 2.0**128, "much", True])
def test_a_penalty_that_float32_cannot_hold_is_refused(value):
    with pytest.raises(ValueError, match=r"repetition_penalty must be a number.* not "):
        Settings(repetition_penalty=value).check(CONFIG)


@pytest.mark.parametrize("value", [settings.SMALLEST, 1, settings.LARGEST])
def test_a_penalty_at_the_ends_of_float32_is_taken(value):
    checked = Settings(repetition_penalty=value, temperature=value).check(CONFIG)
    assert type(checked.repetition_penalty) is float
    assert checked.sampling(CONFIG).repetition_penalty == value


def test_importing_them_imports_no_jax():
    code = "import sys; from gpt2_jax.generation import Settings; Settings(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "gpt2_jax.generation.settings" in loaded
    assert not {"jax", "numpy", "tiktoken", "gpt2_jax.config"} & set(loaded)
