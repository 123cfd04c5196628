"""Saves a random model. test_save_killed.py kills it. The argument is the format."""

import resource
import sys

import checkpoint_forms as forms
import forks

import gpt2_jax


def work(say, directory, seed, form, limit=None):
    """Limit files to `limit` bytes, so that writing fails."""
    params = forms.nested(forms.random_model(seed=seed))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    say()
    gpt2_jax.save(directory, forms.CONFIG, params, format=form)


if __name__ == "__main__":
    if sys.argv[1] == "tensorflow":
        forms.import_tensorflow()
    elif sys.argv[1] == "orbax":
        import orbax.checkpoint  # noqa: F401
    forks.serve(work)
