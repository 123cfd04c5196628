"""A helper process of test_prepare.py: it prepares text over and over, killed before each file operation in turn.

Arguments: a folder, and the texts of the old and the new state. It prints a JSON object: for what was there before,
"old" or "absent", a list of what was there after each kill.
"""

import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import gpt2_jax
from gpt2_jax.data._prepare import prepare
from gpt2_jax.data.token_files import open_prepared

OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Watch:
    """An audit hook that counts what is done to files in a folder, and kills the process before number `last`."""

    def __init__(self, folder: Path, last: int):
        self.folder, self.left, self.count = str(folder), last, 0

    def __call__(self, event, args):
        if event in OPERATIONS or (event == "open" and str(args[0]).startswith(self.folder)):
            if self.count == self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def one_round(work: Path, source: Path, tokenizer, event: int) -> bool:
    """Say whether the process that prepares was killed."""
    child = os.fork()
    if not child:
        sys.addaudithook(Watch(work, event))
        prepare([source], work / "tokens", tokenizer, overwrite=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_all(work: Path, folder: Path, tokenizer, first: str) -> list[str]:
    """Return what is there after each kill, where before it there was `first`."""
    states, killed = [], True
    while killed:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if first == "old":
            prepare([folder / "old.txt"], work / "tokens", tokenizer)
        killed = one_round(work, folder / "new.txt", tokenizer, len(states))
        states.append(state(work / "tokens", folder, tokenizer))
    return states


def state(tokens: Path, folder: Path, tokenizer) -> str:
    if not tokens.exists():
        return "absent"
    prepared = open_prepared(tokens, tokenizer)
    ids = [i for part in (prepared.train, prepared.val) for i in part.read(0, part.n_tokens)[0]]
    texts = {(folder / f"{name}.txt").read_text(): name for name in ("old", "new")}
    return texts.get(tokenizer.decode(ids), "something else")


def main(folder: Path, old: str, new: str) -> None:
    warnings.simplefilter("ignore")  # Python warns of forking beside threads
    tokenizer = gpt2_jax.load_tokenizer(gpt2_jax.embedded_model())
    for name, text in (("old", old), ("new", new)):
        (folder / f"{name}.txt").write_text(text)
    print(json.dumps({first: kill_all(folder / "work", folder, tokenizer, first) for first in ("old", "absent")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
