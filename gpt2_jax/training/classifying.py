"""What only a classifier's run has: a description of its texts at the start, and metrics of all splits at the end."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax import figures, processes
from gpt2_jax.checkpoints import load, runs
from gpt2_jax.data.examples import PreparedExamples
from gpt2_jax.evaluate.label_metrics import draw_confusions, label_metrics, summary
from gpt2_jax.files import replacing_file
from gpt2_jax.params import Params
from gpt2_jax.training.objective import rows_of
from gpt2_jax.training.observer import Observer
from gpt2_jax.training.plan import Plan

METRICS_OF_SPLITS, CONFUSION = "classification.json", "confusion.png"
TITLES = {"train": "training", "val": "validation", "test": "test"}
MOST_COUNTED = 8  # labels whose counts are listed


def describe_texts(plan: Plan, data: PreparedExamples) -> list[str]:
    """Return sentences on the texts of a classifier's run: how many, their labels, and which lose their end."""
    splits = {TITLES[name]: split for name, split in data.by_split().items()}
    said = [", ".join(f"{len(split):,} {name} texts" for name, split in splits.items())]
    counts = data.manifest["train"]["by_label"]
    most = sorted(counts, key=lambda label: -counts[label])
    listed = ", ".join(f"{label} {counts[label]:,}" for label in most[:MOST_COUNTED])
    more = f" and {len(most) - MOST_COUNTED} more labels" if len(most) > MOST_COUNTED else ""
    share = counts[most[0]] / max(sum(counts.values()), 1)
    said.append(f"labels of the training texts: {listed}{more}; {100 * share:.1f} % have the label {most[0]}")
    if data.manifest.get("dropped"):
        said.append(f'classification.balance "undersample" left out {data.manifest["dropped"]:,} texts')
    for name, split in splits.items():
        n_cut = rows_of(plan, data, split).n_cut  # pyright: ignore[reportOptionalMemberAccess]  a row for each text
        if n_cut:
            said.append(
                f"{n_cut:,} of {len(split):,} {name} texts are longer than the {plan.n_tokens:,} tokens of a row, and "
                "lose their end"
            )
    return said


def measure_splits(
    plan: Plan, data: PreparedExamples, run_dir: Path, observer: Observer, step: int, params: Params
) -> None:
    """Measure the run's model on all texts of every split. Write RUN/classification.json and RUN/confusion.png.

    The model is the one with the best validation loss, RUN/best, or the last one if there is no validation.
    """
    best = observer.best_step
    if best not in (None, step):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.state.params)
        params = load(run_dir / runs.BEST, sharding=shardings)[1]
    found: dict[str, Any] = {}
    for name, split in data.by_split().items():
        measured = observer.measure(params, split, at_most=0)
        if measured is None:  # a signal came: the next start measures
            return
        loss, confusion_LL = measured
        found[name] = {"loss": loss} | label_metrics(confusion_LL, data.labels)
        observer.report.message(f"{TITLES[name]}: {summary(found[name])}, loss {loss:.4f} nats a text")
    whole = {"step": step if best is None else best, "labels": list(data.labels), "splits": found}
    processes.on_first(functools.partial(_write, run_dir, whole))


def _write(run_dir: Path, whole: dict[str, Any]) -> None:
    with replacing_file(run_dir / METRICS_OF_SPLITS) as temporary:
        temporary.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    matrices = {
        f"{TITLES[name]}\n{summary(found)}": np.asarray(found["confusion"]) for name, found in whole["splits"].items()
    }
    figures.save(draw_confusions(matrices, whole["labels"]), run_dir / CONFUSION)
