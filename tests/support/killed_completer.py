"""A helper process of test_jsonl.py: it forks a process for each line of JSON on standard input, and kills it.

Line: [source, target, log, batch_size, rounds, seconds after which it is killed or null, the step before which it is or
null]. A step is a line of jsonl.py or files.py that is reached, or an operation on a file. Answer: [steps, error], or
"killed".
"""

import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import filelock  # noqa: F401  once, before the forks

OPERATIONS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
SETTINGS = {"temperature": 0.5, "stop": ("\n", "caf\xe9"), "model": "124M", "top_k": 40}


def fake(log=os.devnull, rounds=1):
    """What completes prompts: by the prompt and its index alone, in some time; `log` gets a line a call."""

    def complete(prompts, first):
        with Path(log).open("a") as file:
            file.write(f"{first} {len(prompts)}\n")
        answers = []
        for i, prompt in enumerate(prompts, start=first):
            digest = prompt.encode(errors="backslashreplace")
            for _ in range(rounds):
                digest = hashlib.sha256(digest + b"%d" % i).digest()
            answers.append({"samples": [f"{prompt} \U0001f98a\n{digest.hex()}", "\xe9" * (i % 3)]})
        return answers

    return complete


class Steps:
    """Counts the steps from now on, and kills the process before number `last`."""

    def __init__(self, module, last):
        self.files, self.last, self.count = {module.__file__, module.files.__file__}, last, 0
        sys.addaudithook(lambda event, args: self.step() if event in OPERATIONS else None)
        sys.settrace(self.trace)

    def step(self):
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.step()
        return self.trace


def run(jsonl, source, target, log, batch_size, rounds, step, pipe):
    """What the child does: never returns."""
    error, complete = "", fake(log, rounds)
    steps = None if step is None else Steps(jsonl, step)
    try:
        jsonl.complete_file(source, target, complete, SETTINGS, batch_size)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    sys.settrace(None)
    os.write(pipe, json.dumps([steps and steps.count, error]).encode())
    os._exit(0)


def main(path):
    spec = importlib.util.spec_from_file_location("jsonl", path)  # not from its package: JAX makes forks slow
    jsonl = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(jsonl)
    for line in sys.stdin:
        source, target, log, batch_size, rounds, delay, step = json.loads(line)
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            run(jsonl, source, target, log, batch_size, rounds, step, send)
        os.close(send)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(receive, "rb") as pipe:
            report = pipe.read()
        print(json.dumps("killed" if os.WIFSIGNALED(status) else json.loads(report)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
