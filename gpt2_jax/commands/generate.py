"""`gpt2-generate`: continue prompts."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

import gpt2_jax
from gpt2_jax.commands import _command, _model, _processes
from gpt2_jax.commands._generate_files import complete_file
from gpt2_jax.commands._generate_options import Options
from gpt2_jax.commands._interactive import converse, print_stream
from gpt2_jax.commands._prompts import descriptor_of, read_prompts
from gpt2_jax.commands._samples import logprob_table, tokens_of, tokens_of_prompt
from gpt2_jax.commands._speaker import Model, Row

if TYPE_CHECKING:
    from gpt2_jax.data.templates import Template
    from gpt2_jax.processes import Share


class Prompt(NamedTuple):
    """A prompt of the command.

    Attributes:
      shown: what is printed before its continuation.
      ids: its ids.
    """

    shown: str
    ids: list[int]


@dataclasses.dataclass
class Args:
    """Continue prompts with GPT-2. Prompts and continuations go to standard output, messages to standard error."""

    model: _model.ModelOption = None
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text to continue; write --prompt=-x if it begins with a dash. If it is empty, the model starts a new text.
    Without a prompt, standard input is the prompt if it is a pipe, a socket or a file. Otherwise the
    prompt is empty."""
    prompt_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A UTF-8 file with one prompt: its whole text, without one newline at the end. - means standard input."""
    instruction: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An instruction to answer, for a model that was trained on instructions. Only the answer is printed."""
    instruction_input: str = ""
    """The text that --instruction is about."""
    template: Annotated[
        str | None,
        tyro.conf.arg(metavar="{alpaca,phi3,plain,none}", help_behavior_hint="(default: that of the run)"),
    ] = None
    """The template that makes a prompt of an instruction. none: --interactive continues texts, as for other models."""
    input: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Many prompts: a file of JSON lines, each {"prompt": "..."} or a string; - means standard input. Needs --output.
    With a template, also {"instruction": "...", "input": "..."} or {"messages": [...]}.
    A line may have settings of its own: {"prompt": "...", "settings": {"temperature": 0, "stop": ["\\n"]}}."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """The file for the samples of --input: JSON lines in order, with the input's fields, "samples" and "index".
    If the process is killed, run the same command again: it resumes.
    - means standard output, where each batch is written as soon as it is done, and nothing can be resumed."""
    skip_bad_lines: bool = False
    """Go on after a bad line of --input, such as one that is not JSON or too long. Its output line has "line" (its
    number, from 1), "error" and "index". By default a bad line ends the command before anything is generated."""
    interactive: bool = False
    """Read prompts from the terminal, with a history. A prompt of several lines begins and ends with \"\"\".
    Ctrl-C stops a sample, Ctrl-D ends the program. A model that was trained on instructions answers in a dialogue."""
    num_samples: int = 1
    """Continuations of each prompt, 1 or more, each with its own random draws."""
    dtype: _model.DtypeOption = None
    """Dtype of weights and matrix products. bfloat16 needs half the memory, but more time on a CPU."""
    echo: bool = True
    """Write the prompt before its continuation."""
    prompt_logprobs: bool = False
    """Also write the log-probability (base e) of each token of a prompt, given those before it.
    They are a table before the first sample, or "prompt_logprobs" of a line of --output."""
    batch_size: int = 16
    """Samples to compute at the same time, 1 or more.
    A larger batch takes less time in total and more memory. The text is the same."""
    mesh: _model.Mesh = dataclasses.field(default_factory=_model.Mesh)
    processes: _processes.Processes = dataclasses.field(default_factory=_processes.Processes)
    sampling: Annotated[Options, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    gc.set_threshold(10**6)  # tracing a model makes hundreds of thousands of objects, and almost none become garbage
    atexit.register(gc.freeze)  # without these two lines, collecting garbage takes a quarter of a short run
    _command.call("gpt2-generate", Args, run, argv, text=True)


def run(args: Args) -> None:
    """Load the model, generate, print."""
    _check(args)
    no_texts = args.interactive or args.input or args.instruction
    texts = [] if no_texts else list(read_prompts(args.prompt, args.prompt_file))
    from gpt2_jax import processes

    share = processes.share()
    if share.count > 1 and not args.input:
        raise ValueError("several processes divide the lines of --input: without it, start one process")
    with share.telling():
        _generate(args, texts, share)


def _generate(args: Args, texts: list[str], share: Share) -> None:
    from gpt2_jax.commands import _dialogue
    from gpt2_jax.generation.prompts import check_prompts

    _model.keep_compiled()
    directory = _model.source(args.model)
    config, tokenizer = gpt2_jax.load_config(directory), gpt2_jax.load_tokenizer(directory)
    model = Model(args.model, args.dtype, config, tokenizer, args.sampling, args.batch_size, args.mesh)
    settings, template = model.settings(), _template(args)
    prompts = [Prompt(text if args.echo else "", model.encode(text)) for text in texts]
    if template is not None:
        ids = [template.prompt_ids(tokenizer, asked, args.instruction_input) for asked in args.instruction]
        prompts += [Prompt("", one) for one in ids]
    if prompts:  # before weights are loaded: that can take long
        check_prompts(config, [prompt.ids for prompt in prompts], settings)
    if args.interactive and template is not None:
        converse(model, args.sampling.seed, _dialogue.Dialogue(model, template).reply, _dialogue.GREETING)
    elif args.interactive:
        echo = args.echo
        converse(
            model,
            args.sampling.seed,
            lambda text, seed: print_stream(model, model.encode(text), seed, text if echo else ""),
        )
    elif args.input and args.output:
        complete_file(model, args, args.input, args.output, share, template)
    else:
        _complete_prompts(model, args, prompts)


def _check(args: Args) -> None:
    """Reject options that do not work together."""
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    ways = {"--prompt": args.prompt, "--prompt-file": args.prompt_file, "--instruction": args.instruction}
    ways |= {"--input": args.input}  # the last one, for the messages
    given = [way for way, value in ways.items() if value]
    others = {
        "--num-samples": args.num_samples > 1,
        "--logprobs": args.sampling.logprobs is not None,
        "--prompt-logprobs": args.prompt_logprobs,
    }
    if args.interactive and (other := [*given, *(name for name, value in others.items() if value)]):
        raise ValueError(f"--interactive reads prompts from the terminal and cannot be given with {other[0]}")
    if args.input and len(given) > 1:
        raise ValueError(f"--input has its own prompts and cannot be given with {given[0]}")
    if args.instruction and len(given) > 1:
        raise ValueError(f"--instruction cannot be given with {given[0]}")
    if args.instruction_input and not args.instruction:
        raise ValueError("--instruction-input is for --instruction")
    from_stdin = [path for path in (*args.prompt_file, args.input) if path and descriptor_of(path) == 0]
    if len(from_stdin) > 1:
        raise ValueError("--prompt-file - reads all of standard input: it can be given only once")
    if sys.stdin is None and (args.interactive or from_stdin):
        raise ValueError("standard input is closed: prompts cannot be read from it")
    if (args.input is None) != (args.output is None):
        raise ValueError("--input and --output need each other: prompts come from one, samples go to the other")
    if args.skip_bad_lines and not args.input:
        raise ValueError("--skip-bad-lines is for the lines of --input")
    _command.check_text("--stop", args.sampling.stop_strings)
    _command.check_text("--instruction", [*args.instruction, args.instruction_input])


def _template(args: Args) -> Template | None:
    """Return the template of an option or of the run; None if none is needed and there is none.

    Raises:
      ValueError: --instruction has no template, or --template is unknown.
    """
    from gpt2_jax.commands._responses import template_for
    from gpt2_jax.data.templates import load_template

    if args.template == "none" and not args.instruction:
        return None
    if args.instruction or args.template:
        return template_for(args.template, args.model)
    return load_template(args.model) if args.interactive or args.input else None


def _complete_prompts(model: Model, args: Args, prompts: list[Prompt]) -> None:
    """Print all samples. A single sample is streamed if standard output is a terminal."""
    _ = model.weights  # loaded before the time is taken
    start, n_new, n_samples = time.perf_counter(), 0, args.num_samples
    tables = args.sampling.logprobs is not None or args.prompt_logprobs
    if len(prompts) * n_samples == 1 and not tables and sys.stdout.isatty():
        print_stream(model, prompts[0].ids, args.sampling.seed, prompts[0].shown)
        return
    settings, ids = model.settings(), [prompt.ids for prompt in prompts]
    names = [f"prompts[{i}]" for i in range(len(prompts))]
    scores = model.score(ids, names) if args.prompt_logprobs else []
    numbers = range(len(prompts) * n_samples)
    rows = [Row(ids[i // n_samples], settings, i, names[i // n_samples]) for i in numbers]
    for i, completion in enumerate(model.complete(rows)):
        which, sample = divmod(i, n_samples)
        if len(rows) > 1:
            prompt = f"prompt {which + 1} of {len(prompts)}, " if len(prompts) > 1 else ""
            print(f"--- {prompt}sample {sample + 1} of {n_samples}", file=sys.stderr, flush=True)
        if scores and sample == 0:
            print(logprob_table(tokens_of_prompt(ids[which], scores[which]), model.tokenizer), flush=True)
        print(prompts[which].shown + completion.text, flush=True)
        if completion.logprobs is not None:
            print(logprob_table(tokens_of(completion), model.tokenizer), flush=True)
        n_new += len(completion.ids)
    print(f"{n_new} tokens in {time.perf_counter() - start:.1f} s, with compilation", file=sys.stderr)
