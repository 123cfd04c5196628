"""What can be refused before anything is loaded: a start that must fail should fail in a second."""

from __future__ import annotations

import os
from pathlib import Path

from gpt2_jax.checkpoints import runs
from gpt2_jax.data.examples import is_prepared_examples
from gpt2_jax.data.sources import STDIN
from gpt2_jax.data.token_files import is_prepared
from gpt2_jax.files import expanded
from gpt2_jax.recipe import Recipe
from gpt2_jax.training.boards import import_wandb


def check_early(recipe: Recipe, run_dir: Path) -> None:
    """Check the text's name, the run's folder, and the settings that do not fit together. Nothing is written.

    Raises:
      ValueError: no text is named, or the settings do not fit together.
      FileNotFoundError: there is no such text.
      FileExistsError: the folder holds something else.
      OSError: the folder cannot be written, or another process trains the run.
    """
    data, monitor = recipe.data, recipe.monitor
    if not data.path:
        raise ValueError("data.path must name text or a folder that gpt2-prepare wrote: pass --data.path")
    for path in (data.path, *dict(data.own_validation()).values()):
        if path != STDIN and not expanded(path).exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
    without = (
        not data.own_validation()
        and not data.val_fraction
        and not is_prepared(data.path)
        and not is_prepared_examples(data.path)
    )
    if monitor.patience and (without or not monitor.evaluate_every):
        raise ValueError("monitor.patience needs validation losses: set monitor.evaluate_every, and validation text")
    if monitor.wandb:
        import_wandb()
    _check_folder(run_dir)


def _check_folder(run_dir: Path) -> None:
    runs.check_free(run_dir)
    there = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{run_dir} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{run_dir} cannot be written: there is no permission for {there}")
    if (run_dir / runs.CHECKPOINTS).is_dir():
        with runs.locked(run_dir):
            pass
