"""The command line of EleutherAI's lm-evaluation-harness, with our models in it::

    python -m gpt2_jax.evaluate.lm_eval --model gpt2-jax --model_args model=124M --tasks lambada_openai

The harness finds models only in its own list, and no other package can add to that list before its command starts. So
this module adds `gpt2-jax`, and then runs the harness's command. All options of the harness work. The arguments of
`gpt2-jax` are those of `from_arguments`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpt2_jax.checkpoints import embedded_model, load, load_tokenizer
from gpt2_jax.checks import whole_number
from gpt2_jax.evaluate.harness import language_model

if TYPE_CHECKING:
    from lm_eval.api.model import LM

NAME = "gpt2-jax"


def from_arguments(
    model: str | None = None,
    pretrained: str | None = None,
    dtype: str | None = None,
    max_gen_toks: int = 256,
    seed: int = 0,
    batch_size: int | str = 1,
    **ignored: Any,
) -> LM:
    """Return the model for arguments of the harness's command line.

    Args:
      model: anything that `gpt2_jax.load` takes; None means the embedded model.
      pretrained: another name of `model`, which the harness's own models use.
      dtype: dtype of weights and matrix products; None keeps that of the checkpoint.
      max_gen_toks: most new tokens of a text, if the task does not set it.
      seed: seed of the draws, if a task samples.
      batch_size: texts to generate at the same time, 1 or more.
      ignored: options of the harness for torch: device and max_batch_size.

    Raises:
      ValueError: an argument is unknown or wrong.
      FileNotFoundError, OSError: as `gpt2_jax.load`.
    """
    known = ("model", "pretrained", "dtype", "max_gen_toks", "seed")
    if unknown := ignored.keys() - {"device", "max_batch_size"}:
        raise ValueError(
            f"--model_args of {NAME} has an unknown name, {min(unknown)!r}: it can have {', '.join(known)}"
        )
    if model is not None and pretrained is not None:
        raise ValueError(f"--model_args of {NAME} has model and pretrained, two names of the same argument")
    if not str(batch_size).isdecimal():
        raise ValueError(f"--batch_size of {NAME} must be a whole number, 1 or more, not {batch_size!r}")
    seed = whole_number("seed", seed, 0, 2**32 - 1)
    named = pretrained if model is None else model
    source = embedded_model() if named is None else str(named)
    tokenizer = load_tokenizer(source)
    config, params = load(source, dtype=dtype)
    config = config if dtype is None else config.replace(compute_dtype=dtype)
    how: dict[str, Any] = {"batch_size": int(batch_size), "max_gen_toks": max_gen_toks, "seed": seed}
    return language_model(config, params, tokenizer, **how)


def register() -> None:
    """Add `gpt2-jax` to the harness's models, also for `lm_eval.simple_evaluate("gpt2-jax", "model=124M")`.

    Raises:
      ModuleNotFoundError: the harness is not installed.
    """
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import simple_parse_args_string

    def of_object(cls: type, given: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> LM:
        return from_arguments(**given, **{name: value for name, value in (more or {}).items() if value is not None})

    def of_string(cls: type, given: str, more: Mapping[str, Any] | None = None) -> LM:
        return of_object(cls, simple_parse_args_string(given), more)

    makers = {"create_from_arg_obj": classmethod(of_object), "create_from_arg_string": classmethod(of_string)}
    if NAME not in model_registry:
        model_registry.register(NAME)(type("GPT2Jax", (LM,), makers))


def main() -> None:
    """Run the harness's command."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
