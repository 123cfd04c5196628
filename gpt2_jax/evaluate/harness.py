"""An adapter that gives our models to EleutherAI's lm-evaluation-harness. Its `simple_evaluate` takes them like this::

    import gpt2_jax, lm_eval
    from gpt2_jax.evaluate.harness import language_model

    config, params = gpt2_jax.load("models/124M")
    model = language_model(config, params, gpt2_jax.load_tokenizer("models/124M"))
    results = lm_eval.simple_evaluate(model, tasks=["lambada_openai", "wikitext"])
    print(lm_eval.utils.make_table(results))

`gpt2_jax.evaluate.lm_eval` makes the models available to lm_eval's command line.

Tokens, windows and cuts are those of the harness's own adapter for Hugging Face models (HFLM, in
lm_eval/models/huggingface.py), so the numbers are comparable. Needs the `lm-eval` package, 0.4.13 or later.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpt2_jax.activations import Tap
from gpt2_jax.changes import Changes, Edits, check_changes
from gpt2_jax.checks import whole_number
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.decoding import complete
from gpt2_jax.generation.scoring import score
from gpt2_jax.generation.settings import Settings
from gpt2_jax.params import Params
from gpt2_jax.tokenizer import Tokenizer, end_of_text

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

REQUESTS_A_CALL = 256  # requests per call of `score`: after each call, the progress bar moves and the cache is filled
# The filters that a task may set for generation. `generate` and Hugging Face use the same names.
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")


def language_model(
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    max_gen_toks: int = 256,
    seed: int = 0,
    edits: Edits = (),
    taps: Mapping[str, Tap] | None = None,
) -> TemplateLM:
    """Return the model for the harness's `simple_evaluate` and `evaluate`.

    Args:
      config: the model's hyperparameters.
      params: the model's parameters, from `load`.
      tokenizer: the model's tokenizer, from `load_tokenizer`.
      batch_size: texts to generate at the same time; each needs a KV cache of at most n_ctx tokens.
      max_gen_toks: most new tokens of a text, if the task does not set it; 1 or more, and less than n_ctx when used.
      seed: seed of the draws, if a task samples; in [0, 2**32).
      edits: activation edits from `gpt2_jax.research`, applied in every forward pass. A value is the same for all rows
        and tokens.
      taps: functions of activations, as `research.forward` takes them.

    Raises:
      ValueError: batch_size or max_gen_toks is not a whole number, 1 or more.
      ModuleNotFoundError: the harness is not installed.
    """
    from lm_eval.api.model import TemplateLM

    batch_size, max_gen_toks = whole_number("batch_size", batch_size, 1), whole_number("max_gen_toks", max_gen_toks, 1)
    kind = type("GPT2", (_Answers, TemplateLM), {"__doc__": _Answers.__doc__})
    changes = check_changes(config, edits, taps, whole_rows=False, longest_B=[config.n_ctx])
    return kind(config, params, tokenizer, batch_size, max_gen_toks, seed, changes)


class _Answers:
    """Answers the three kinds of request. The second base class, TemplateLM, has the method `loglikelihood`.

    `loglikelihood` encodes each context with its continuation, and calls `_loglikelihood_tokens`. Spaces at the end of
    a context become part of the continuation. An empty context becomes the end-of-text token.
    """

    cache_hook: Any  # these two belong to TemplateLM
    prefix_token_id: Any

    def __init__(
        self,
        config: GPT2Config,
        params: Params,
        tokenizer: Tokenizer,
        batch_size: int,
        max_gen_toks: int,
        seed: int,
        changes: Changes,
    ):
        super().__init__()
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.batch_size, self.max_gen_toks, self.seed, self.changes = batch_size, max_gen_toks, seed, changes

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-text token, which is put before a text."""
        return end_of_text(self.tokenizer, "a task without a context")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text. Special tokens in it become their ids. No special id is added."""
        return self.tokenizer.encode(string, allow_special=True, template=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether each of its tokens was the most likely.

        If a context and its continuation have more than n_ctx + 1 tokens, only the last n_ctx + 1 are used.

        Args:
          requests: tuples of the texts (context, continuation) or None, the context's ids, and the continuation's ids.
          disable_tqdm: show no progress bar.

        Raises:
          ValueError: a continuation has no tokens, or more than n_ctx.
        """
        from tqdm import tqdm

        rows = [self._row(*request) for request in requests]
        _warn_of_cuts(sum(len(context) + len(own) > self.config.n_ctx + 1 for _, context, own in requests), len(rows))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        with tqdm(total=len(rows), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for block in _longest_first(rows, REQUESTS_A_CALL):
                some = [rows[i] for i in block]
                first = [len(rows[i]) - len(requests[i][2]) for i in block]
                # A stride of n_ctx makes n_ctx + 1 tokens one window: its last token is only predicted, never read.
                scores = score(
                    self.config, self.params, some, stride=self.config.n_ctx, first=first, edits=self.changes
                )
                for i, scored in zip(block, scores, strict=True):
                    answers[i] = (scored.sum, bool(scored.greedy.all()))
                    if (texts := requests[i][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[i])
                bar.update(len(block))
        return answers

    def _row(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> list[int]:
        """Return the tokens to score for one request."""
        n_ctx = self.config.n_ctx
        if not 1 <= len(continuation) <= n_ctx:
            raise ValueError(
                f"a continuation must have from 1 to {n_ctx} (n_ctx) tokens, not {len(continuation)}: {texts!r:.200}"
            )
        row = (context or [self.prefix_token_id]) + continuation  # a context of only spaces has no tokens left
        return row[-(n_ctx + 1) :]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text.

        The first window is the end-of-text token and as many tokens as fit. Each later window reads n_ctx tokens, and
        predicts the tokens that no earlier window predicted. If few are left, the last window has more context.

        Args:
          requests: requests with one text each.
          disable_tqdm: show no progress bar.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, text_of = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(*request.args)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.config.n_ctx, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                text_of.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(text_of, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context. It ends before a stop string or the end-of-text token, or at
        max_gen_toks.

        If a context and max_gen_toks new tokens do not fit in n_ctx, only the last tokens of the context are read.

        Args:
          requests: requests with a context and the task's generation kwargs each. The kwargs are until (a stop string
            or a list of them); max_gen_toks, or one of its other names; do_sample; temperature, by default 0 (greedy);
            top_k, top_p, min_p and repetition_penalty, by default off (HFLM draws from the 50 most likely). top_p also
            keeps the token that crosses p.
          disable_tqdm: show no progress bar.

        Raises:
          ValueError: a generation kwarg is unknown or out of range; raised before anything is generated.
        """
        from tqdm import tqdm

        groups: dict[Settings, list[int]] = {}
        for i, request in enumerate(requests):
            arguments: tuple = request.args
            groups.setdefault(self._settings(arguments[1]), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for settings, group in groups.items():
                prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in group]
                n_fit = self.config.n_ctx - settings.max_new_tokens
                _warn_of_cuts(sum(len(prompt) > n_fit for prompt in prompts), len(prompts))
                n_done = 0
                for block in _longest_first(prompts, self.batch_size):
                    some = [prompts[k][-n_fit:] for k in block]
                    rows = complete(self.config, self.params, some, self.tokenizer, settings, n_done, self.changes)
                    for k, row in zip(block, rows, strict=True):
                        texts[group[k]] = row.text
                        self.cache_hook.add_partial("generate_until", requests[group[k]].args, row.text)
                    n_done += len(block)
                    bar.update(len(block))
        return texts

    def _settings(self, kwargs: Mapping[str, Any]) -> Settings:
        """Return the settings for a task's generation kwargs."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(kwargs), self.max_gen_toks))
        eot = self.tokenizer.eot  # some vocabularies spell it </s>, and some have none
        end = None if eot is None else self.tokenizer.decode([eot])
        stop_strings = handle_stop_sequences(asked.pop("until"), eos=end)
        n_new, samples, temperature = asked.pop("max_gen_toks"), asked.pop("do_sample"), asked.pop("temperature", 0)
        if asked.get("num_beams") == 1:  # many tasks set it: no beam search
            del asked["num_beams"]
        if unknown := asked.keys() - set(FILTERS):
            known = ", ".join(("until", "max_gen_toks", "do_sample", "temperature", *FILTERS))
            wrong = ", ".join(f"{name}={asked[name]!r}" for name in sorted(unknown))
            raise ValueError(f"a task sets {wrong}, which is not supported; these are supported: {known}")
        if samples and temperature == 0:
            raise ValueError("a task sets do_sample at a temperature of 0: set its temperature above 0")
        if n_new >= self.config.n_ctx:
            raise ValueError(
                f"a task asks for up to max_gen_toks={n_new} new tokens, which leaves no room for a context in the "
                f"model's n_ctx, {self.config.n_ctx}: set fewer, for example with gen_kwargs of simple_evaluate"
            )
        settings = Settings(n_new, temperature, seed=self.seed, top_p_rule="common", stop_strings=stop_strings, **asked)
        return settings.check(self.config, self.tokenizer)


def _longest_first(rows: Sequence[Sequence[int]], n_rows: int) -> list[list[int]]:
    """Return the indices of all rows, `n_rows` at a time, longest first, so that too little memory shows at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[start : start + n_rows] for start in range(0, len(order), n_rows)]


def _warn_of_cuts(n_cut: int, n: int) -> None:
    if n_cut:
        logging.getLogger(__name__).warning(
            f"{n_cut} of {n} contexts do not fit in the model's n_ctx together with the tokens after them: only their "
            "last tokens are read"
        )
