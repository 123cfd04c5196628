"""A helper process of test_save_killed.py: it forks a saver for each line of JSON on standard input, and kills it.

Line: {"directory", "seed", and one of "delay": seconds after which it is killed, "event": the number of the file
operation before which it is, "limit": the bytes a file may have, so that writing fails}. Answer: {"seconds", "events",
"killed", "error"}.
"""

import json
import os
import pickle
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import checkpoint_forms as forms

import gpt2_jax

OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}


class Watch:
    """An audit hook that counts what is done to files in a folder, and kills the process before number `last`."""

    def __init__(self, folder: str, last: int):
        self.folder, self.left, self.count = folder, last, 0

    def __call__(self, event, args):
        if event in OPERATIONS or (event == "open" and str(args[0]).startswith(self.folder)):
            if self.count == self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def save(form: str, request: dict, pipe: int):
    """What the child does: never returns."""
    error, params = "", forms.nested(forms.random_model(seed=request["seed"]))
    watch = Watch(str(Path(request["directory"]).parent), request.get("event", -1))
    sys.addaudithook(watch)
    if "limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
    os.write(pipe, b".")
    try:
        gpt2_jax.save(request["directory"], forms.CONFIG, params, format=form)
    except BaseException as caught:
        error = ([kind.__name__ for kind in type(caught).__mro__], str(caught))
    os.write(pipe, pickle.dumps({"events": watch.count, "error": error}))
    os._exit(0)


def one_round(form: str, request: dict) -> dict:
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        save(form, request, send)
    os.close(send)
    os.read(receive, 1)
    start = time.perf_counter()
    if "delay" in request:
        time.sleep(request["delay"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    answer = {"seconds": time.perf_counter() - start, "killed": os.WIFSIGNALED(status), "events": None, "error": ""}
    with os.fdopen(receive, "rb") as pipe:
        if report := pipe.read():
            answer |= pickle.loads(report)
    return answer


def main(form: str):
    warnings.simplefilter("ignore")  # Python warns of forking beside threads; the child starts its own
    if form == "tensorflow":
        forms.import_tensorflow()
    elif form == "orbax":
        import orbax.checkpoint  # noqa: F401
    for line in sys.stdin:
        print(json.dumps(one_round(form, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
