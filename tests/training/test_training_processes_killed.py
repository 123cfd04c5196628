"""`gpt2-train` in several processes, of which one is killed at a random moment: all end soon, and nothing is lost."""

import sys

import killed_processes
import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the children of a process in /proc")
def test_a_run_whose_processes_are_killed_ends_as_if_they_never_were(tmp_path):
    """The support file is a script, too, for many kills."""
    kills, faults = killed_processes.campaign(tmp_path, 3, seed=5)
    assert not faults, "\n".join(faults)
    assert len(kills) == 3
    assert max(kill.step for kill in kills) > 0  # some kills came after a checkpoint
