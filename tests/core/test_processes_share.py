"""A process's share of work. One process has all of it, and pays nothing."""

import itertools
import subprocess
import sys

import pytest

from gpt2_jax import processes
from gpt2_jax.processes import Share


@pytest.mark.parametrize(("count", "n"), [(1, 5), (2, 5), (3, 2), (4, 0)])
def test_shares_are_the_whole_and_disjoint(count, n):
    shares = [list(Share(i, count).of(range(n))) for i in range(count)]
    assert sorted(itertools.chain(*shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_has_all_without_a_link():
    share = processes.share()
    assert (share, share.link) == (Share(0, 1), None)
    assert share.gather(lambda: "result") == ["result"]
    share.check()
    with pytest.raises(KeyError), share.telling():
        raise KeyError


def test_asking_for_the_share_starts_no_backend():
    """Finding devices takes seconds on a GPU."""
    code = "from gpt2_jax import processes; processes.share(); from jax._src import xla_bridge as x; print(x._backends)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "{}\n"
