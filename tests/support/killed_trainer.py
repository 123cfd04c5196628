"""A helper process of test_training_checkpoints.py: it forks one that saves and saves, for each line on its input.

Line: {"run", and one of "saves": after how many it is killed, such as 1.7: some time after the first was complete;
"rename": before which of its renamings of files}. Answer: {"complete": the last step whose save the fork knew to be
complete, 0 if none, "failed": what stopped it before that}.
"""

import json
import os
import signal
import sys
import time

from orbax.checkpoint import v1  # noqa: F401  here, not in each fork
from train_states import abstract, assert_same, random_state

from gpt2_jax.training.checkpoints import Checkpoints

SHAPES = {f"h{i}/attn/c_attn/w": (101, 31) for i in range(7)}


def train(run: str, pipe: int, rename: int) -> None:
    """What the fork does: go on where the newest checkpoint is, until it is killed."""
    renamings = iter(range(rename))

    def watch(event, args):
        if event == "os.rename" and next(renamings, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    if rename >= 0:
        sys.addaudithook(watch)
    try:
        with Checkpoints(run) as checkpoints:
            step = checkpoints.latest() or 0
            if step:
                expected = random_state(step, shapes=SHAPES)
                assert_same(checkpoints.restore(abstract(expected)), expected)
            os.write(pipe, f"{step}\n".encode())
            while True:
                step += 1
                checkpoints.save(step, random_state(step, shapes=SHAPES))
                os.write(pipe, f"{step - 1}\n".encode())
    except BaseException as error:
        os.write(pipe, f"{error!r}\n".encode())
    os._exit(1)


def one_round(run: str, saves: float = 0, rename: int = -1) -> dict:
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        train(run, send, rename)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        told = [pipe.readline(), pipe.readline()]  # it is open, and it has begun
        start = time.perf_counter()
        told += [pipe.readline() for _ in range(int(saves))]
        one = (time.perf_counter() - start) / int(saves) if saves >= 1 else 0.1
        if rename < 0:
            time.sleep(saves % 1 * one)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = (b"".join(told) + pipe.read()).decode().splitlines()[-1]
    return {"complete": int(last), "failed": ""} if last.isdigit() else {"complete": 0, "failed": last}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(one_round(**json.loads(line))), flush=True)
