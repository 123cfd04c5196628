"""Saves state after state, and sends the steps whose save is complete. test_training_checkpoints.py kills it."""

import forks
from orbax.checkpoint import v1  # noqa: F401  here, not in each fork
from train_states import abstract, assert_same, random_state

from gpt2_jax.training.checkpoints import Checkpoints

SHAPES = {f"h{i}/attn/c_attn/w": (101, 31) for i in range(7)}


def work(say, run):
    """Resume from the newest checkpoint, and continue without end."""
    with Checkpoints(run) as checkpoints:
        step = checkpoints.latest() or 0
        if step:
            expected = random_state(step, shapes=SHAPES)
            assert_same(checkpoints.restore(abstract(expected)), expected)
        say(step)
        while True:
            step += 1
            checkpoints.save(step, random_state(step, shapes=SHAPES))
            say(step - 1)


if __name__ == "__main__":
    forks.serve(work, operations={"os.rename"})
