"""Checks of a loaded model against known values: pure functions of (config, params, tokenizer). They return plain data.

They belong here and not in `gpt2_jax.release`, because they run the model: `release` may import neither the model nor
the generation loop.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.checkpoints.integrity import count_non_finite
from gpt2_jax.checkpoints.vocabulary import fits
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation import generate
from gpt2_jax.inspection.known_values import Greedy, KnownValues
from gpt2_jax.model import GPT2, abstract_params
from gpt2_jax.params import Params, differences, flatten
from gpt2_jax.tokenizer import Tokenizer, fingerprint

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"
NOT_KNOWN = "the shape or the arithmetic is not that of a released size or of the embedded model"
SHOWN = 3  # tensors that a check names
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative: covers the rounding of a value

Check = dict[str, Any]
"""check: what is checked; expected; found; result: "pass", "fail" or "not applicable"; note: why, or ""."""


def verify(config: GPT2Config, params: Params, tokenizer: Tokenizer | None, known: KnownValues | None) -> list[Check]:
    """Check a loaded model against known values. Without known values, only the checks that fit every model are made.

    Args:
      config, params: the result of `load`.
      tokenizer: the result of `load_tokenizer`; None if the model has no vocabulary.
      known: the values to expect, usually `known_for(config)`.

    Returns:
      The checks in a fixed order. `json.dumps(..., allow_nan=False)` accepts them.
    """
    tensors = check_tensors(config, params, known)
    checks = [*tensors, *check_values(config, params, known), *check_vocabulary(config, tokenizer, known)]
    if any(check["result"] == FAIL for check in tensors if check["check"] == "names and shapes"):
        return [*checks, _not_applicable("run the model", "its tensors have other names or shapes")]
    return [*checks, check_logits(config, params), *check_greedy(config, params, tokenizer, known)]


def check_tensors(config: GPT2Config, params: Params, known: KnownValues | None) -> list[Check]:
    """Check the hyperparameters, the number of parameters, all names and shapes, and that every value is finite.

    Without known values, the expected number of parameters and the expected shapes come from the config.
    """
    flat = flatten(params)
    hparams = config.to_hparams()
    checks = [
        _not_applicable("hyperparameters", NOT_KNOWN, found=hparams)
        if known is None
        else _equal("hyperparameters", dict(known.hparams), hparams)
    ]
    n_params = config.n_params if known is None else known.n_params
    checks.append(_equal("parameters", n_params, sum(int(leaf.size) for leaf in flat.values())))
    shaped_as = config if known is None else config.replace(**known.hparams)
    expected = flatten(abstract_params(shaped_as))
    wrong = differences(flat, expected, dtypes=False)
    checks.append(_all("names and shapes", f"{len(expected)} tensors", f"{len(flat)} tensors", wrong))
    counts = {name: count_non_finite(np.asarray(leaf)) for name, leaf in flat.items()}
    bad = [f"{name}: {n} NaN or infinite" for name, n in counts.items() if n]
    checks.append(_all("every value is finite", "finite", "finite", bad))
    return checks


def check_values(config: GPT2Config, params: Params, known: KnownValues | None) -> list[Check]:
    """Check single values of tensors, up to the rounding of the dtype that the params are stored in."""
    if known is None or not known.values:
        return [_not_applicable("values of tensors", _unknown(known))]
    flat, checks = flatten(params), []
    for name, index, expected in known.values:
        try:
            found = float(np.asarray(flat[name])[index])
        except (KeyError, IndexError):
            found = None  # another check reports the tensor that is absent or has another shape
        tolerance = TOLERANCE.get(config.param_dtype.name, TOLERANCE["float32"])
        passed = found is not None and abs(found - expected) <= tolerance * abs(expected)
        shown = found if found is not None and np.isfinite(found) else None
        checks.append(_check(f"{name}[{', '.join(map(str, index))}]", expected, shown, passed))
    return checks


def check_vocabulary(config: GPT2Config, tokenizer: Tokenizer | None, known: KnownValues | None) -> list[Check]:
    """Check the number of tokens, the sha256 of all tokens and merges, and the ids of some texts.

    Without known values, the embedding may have some rows more than tokens, which are padding, or lack added tokens.
    """
    if tokenizer is None:
        return [_not_applicable("vocabulary", "the model has no vocabulary")]
    about = "tokens in the vocabulary"
    if known is None:
        passed = fits(tokenizer, config.n_vocab)
        return [
            _check(about, config.n_vocab, tokenizer.n_vocab, passed),
            _not_applicable("token ids", NOT_KNOWN),
        ]
    checks = [_equal(about, config.n_vocab, tokenizer.n_vocab)]
    checks.append(_equal("sha256 of tokens and merges", known.vocabulary, fingerprint(tokenizer)))
    for text, expected in known.ids.items():
        ids = tokenizer.encode(text, allow_special=True)
        checks.append(_equal(f"id of {text!r}", expected, ids[0] if len(ids) == 1 else ids))
    return checks


def check_logits(config: GPT2Config, params: Params) -> Check:
    """Check that one forward pass over a few tokens gives finite logits."""
    tokens = jnp.arange(min(8, config.n_vocab, config.n_ctx))[None]
    logits = np.asarray(jax.jit(GPT2(config).apply)({"params": params}, tokens).logits)
    n_bad = count_non_finite(logits)
    return _all("logits of a forward pass", "finite", "finite", [f"{n_bad} NaN or infinite"] if n_bad else [])


def check_greedy(
    config: GPT2Config, params: Params, tokenizer: Tokenizer | None, known: KnownValues | None
) -> list[Check]:
    """Check continuations by greedy decoding, with matrix products in full float32 on every device."""
    if known is None or not known.greedy:
        return [_not_applicable("greedy continuation", _unknown(known))]
    if config.param_dtype != np.float32:
        note = f"known for float32 weights, and these are {config.param_dtype.name}"
        return [_not_applicable("greedy continuation", note)]
    return [_check_one_greedy(config, params, tokenizer, one) for one in known.greedy]


def _check_one_greedy(config: GPT2Config, params: Params, tokenizer: Tokenizer | None, known: Greedy) -> Check:
    if isinstance(known.prompt, str):
        about = f"greedy continuation of {known.prompt!r}"
        if tokenizer is None:
            return _not_applicable(about, "the model has no vocabulary")
        prompt = tokenizer.prompt(known.prompt)
    else:
        prompt = list(known.prompt)
        about = f"greedy continuation of {prompt}"
    with _float32_products():
        config = config.replace(compute_dtype="float32")
        try:
            rows = cast("list[list[int]]", generate(config, params, [prompt], known.n_tokens, temperature=0))
        except ValueError as error:  # NaN or infinite logits
            return _check(about, known.continuation, str(error), passed=False)
    if not isinstance(known.continuation, str):
        return _equal(about, list(known.continuation), rows[0])
    can_decode = tokenizer is not None and max(rows[0]) < tokenizer.n_vocab
    return _equal(about, known.continuation, tokenizer.decode(rows[0]) if tokenizer and can_decode else rows[0])


def _unknown(known: KnownValues | None) -> str:
    return NOT_KNOWN if known is None else f"no value of {known.name} is known here"


def _float32_products() -> contextlib.AbstractContextManager:
    """Keep GPUs and TPUs from rounding the inputs of float32 products; a CPU does not round them."""
    is_cpu = jax.default_backend() == "cpu"
    return contextlib.nullcontext() if is_cpu else jax.default_matmul_precision("highest")


def _check(about: str, expected: Any, found: Any, passed: bool) -> Check:
    return {"check": about, "expected": expected, "found": found, "result": PASS if passed else FAIL, "note": ""}


def _equal(about: str, expected: Any, found: Any) -> Check:
    return _check(about, expected, found, found == expected)


def _all(about: str, expected: str, found: str, wrong: list[str]) -> Check:
    """Return a check that passes if `wrong` is empty. If not, the check lists the first few entries of `wrong`."""
    more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    return _check(about, expected, "; ".join([*wrong[:SHOWN], *more]) or found, not wrong)


def _not_applicable(about: str, note: str, found: Any = None) -> Check:
    return {"check": about, "expected": None, "found": found, "result": NOT_APPLICABLE, "note": note}
