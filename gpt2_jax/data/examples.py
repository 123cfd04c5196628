"""Examples: short texts that are trained on one by one, each with a label or with a mask of what counts in the loss.

A folder of examples holds, for each split, train.bin (the ids of all examples, one after another), train.ends.bin (the
end of each example in tokens, int64), train.mask.bin (a byte for each token, 1 if it counts in the loss) or
train.labels.bin (int32), and the manifest examples.json. Numbers are little-endian. test.records.jsonl holds what the
test examples were made from, if they were made from records.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from gpt2_jax import files
from gpt2_jax.data.token_files import Tokens, id_dtype
from gpt2_jax.files import expanded, read_json, sha256_of
from gpt2_jax.tokenizer import Tokenizer, fingerprint

MANIFEST = "examples.json"
VERSION = 1
SPLITS = ("train", "val", "test")
KINDS = (".bin", ".ends.bin", ".mask.bin", ".labels.bin", ".records.jsonl")
BLOCK = 2**22  # tokens whose masks are read at a time
FILES = {MANIFEST, *(f"{split}{kind}" for split in SPLITS for kind in KINDS)}


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One example, before it is written.

    Attributes:
      ids: its token ids.
      counts: for each id, whether it is a target of the loss; None if the example has a label.
      label: its label; None if it has none.
      record: what it was made from; the records of the test split are kept. None keeps nothing.
    """

    ids: np.ndarray
    counts: np.ndarray | None = None
    label: str | None = None
    record: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The examples of one split.

    Attributes:
      tokens: the ids of all examples, one after another.
      ends: int64 [n], where each example ends.
      labels: int32 [n], the number of each example's label; None if the examples have no labels.
      files: the files that hold the split.
    """

    tokens: Tokens
    ends: np.ndarray
    labels: np.ndarray | None = None
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def path(self) -> Path:
        """The file of the ids."""
        return self.tokens.path

    @property
    def n_tokens(self) -> int:
        """Tokens of all examples."""
        return self.tokens.n_tokens

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens of each example."""
        return np.diff(self.ends, prepend=0)

    def within(self, n_rows: int) -> Examples:
        """Return the same examples for a model with this many rows: an id without a row is refused."""
        return dataclasses.replace(self, tokens=self.tokens.within(n_rows))

    def read(self, number: int, start: int = 0, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 and counts float32 of an example, or of `count` of its tokens from `start` on."""
        begin = int(self.ends[number - 1]) if number else 0
        left = int(self.ends[number]) - begin - start
        return self.tokens.read(begin + start, left if count is None else min(count, left))

    def n_targets(self, size: int) -> np.ndarray:
        """Return int64 [n], the targets among the first `size` tokens of each example. The first token is none."""
        starts = self.ends - self.lengths
        stops = np.minimum(self.ends, starts + size)
        if self.tokens.mask_path is None:
            return np.maximum(stops - starts - 1, 0)
        found, first = np.zeros(len(self), np.int64), 0
        while first < len(self):
            begin = int(starts[first])
            after = max(int(np.searchsorted(self.ends, begin + BLOCK, "right")), first + 1)
            some = slice(first, after)
            _, counts = self.tokens.read(begin, int(self.ends[after - 1]) - begin)
            before = np.concatenate([[0], np.cumsum(counts.astype(np.int64))])
            found[some] = before[stops[some] - begin] - before[np.minimum(starts[some] + 1, stops[some]) - begin]
            first = after
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedExamples:
    """Examples in splits.

    Attributes:
      train: the examples for training.
      val: the examples for validation; None if there are none.
      test: the examples for the test at the end; None if there are none.
      manifest: the content of examples.json.
    """

    train: Examples
    val: Examples | None
    test: Examples | None
    manifest: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels; empty if the examples have none."""
        return tuple(self.manifest["labels"])

    @property
    def longest(self) -> int:
        """Tokens of the longest example of all splits."""
        return max(int(split.lengths.max()) for split in self.by_split().values())

    def within(self, n_rows: int) -> PreparedExamples:
        """Return the same examples for a model with this many rows. An id without a row is refused when it is read."""
        train, val, test = (split and split.within(n_rows) for split in (self.train, self.val, self.test))
        return PreparedExamples(cast("Examples", train), val, test, self.manifest)

    def digests(self) -> dict[str, str]:
        """Return {file name: sha256} of all files, read from the disk."""
        return {path.name: sha256_of(path) for split in self.by_split().values() for path in split.files}

    def check(self) -> None:
        """Compare every file with the sha256 in the manifest.

        Raises:
          ValueError: a file differs.
        """
        for name, digest in self.digests().items():
            if digest != self.manifest["sha256"].get(name):
                path = self.train.path.with_name(name)
                raise ValueError(f"{path} has changed: its sha256 is not that in {MANIFEST}; prepare the folder again")

    def by_split(self) -> dict[str, Examples]:
        """Return {"train", "val" or "test": its examples} of the splits that have any."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}


def is_prepared_examples(path: str | os.PathLike) -> bool:
    """Return whether this path is a folder of examples."""
    return (expanded(path) / MANIFEST).is_file()


def open_examples(path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> PreparedExamples:
    """Open a folder that `write_examples` wrote. The sha256 of each file is compared with the manifest.

    Args:
      path: the folder.
      tokenizer: the tokenizer that the ids must belong to; None accepts any.

    Raises:
      FileNotFoundError: the folder has no examples.
      ValueError: it was made with another vocabulary, or a file is damaged.
    """
    folder = expanded(path)
    if not is_prepared_examples(folder):
        raise FileNotFoundError(f"{folder} has no examples: it holds no {MANIFEST}")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("gpt2_jax_examples") != VERSION:
        raise ValueError(f"{folder / MANIFEST} is damaged, or from another version: prepare the examples again")
    if tokenizer is not None and manifest["tokenizer_sha256"] != fingerprint(tokenizer):
        raise ValueError(f"{folder} was prepared with another vocabulary: prepare the examples again")
    splits = {split: _open_split(folder, split, manifest) for split in SPLITS}
    prepared = PreparedExamples(splits["train"], splits["val"], splits["test"], manifest)
    prepared.check()
    return prepared


def _open_split(folder: Path, split: str, manifest: Mapping[str, Any]) -> Any:
    paths = {kind: folder / f"{split}{kind}" for kind in KINDS}
    if f"{split}.bin" not in manifest["sha256"]:
        return None
    for path in paths.values():
        if path.name in manifest["sha256"] and not path.is_file():
            raise ValueError(f"{path} is missing: prepare the examples again")
    ends = np.fromfile(paths[".ends.bin"], "<i8")
    labelled = paths[".labels.bin"].name in manifest["sha256"]
    labels = np.fromfile(paths[".labels.bin"], "<i4") if labelled else None
    mask = None if labelled else paths[".mask.bin"]
    tokens = Tokens(paths[".bin"], int(ends[-1]), manifest["n_vocab"], mask)
    present = tuple(path for path in paths.values() if path.name in manifest["sha256"])
    return Examples(tokens, ends, labels, present)


def write_examples(
    folder: str | os.PathLike,
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
    undersample: bool = False,
    overwrite: bool = False,
    more: Mapping[str, Any] | None = None,
) -> PreparedExamples:
    """Write examples to a new folder, divided at random into splits. The folder appears in one step.

    The examples are held in memory while they are divided.

    Args:
      folder: the folder to write.
      examples: the examples: all with labels, or all without.
      tokenizer: the vocabulary of the ids.
      val_fraction: fraction of the examples for validation, at least one example if it is not 0.
      test_fraction: fraction of the examples for the test, at least one example if it is not 0.
      seed: the seed of the division.
      undersample: drop examples at random, so that each label has as many as the rarest one.
      overwrite: replace the folder, if it contains only examples.
      more: fields to add to the manifest.

    Raises:
      FileExistsError: the folder is not empty, and may not be replaced.
      ValueError: there are no examples, or too few for the splits.
    """
    folder = expanded(folder)

    def check() -> None:
        def others(names: set[str]) -> set[str]:
            return names - FILES or (set() if MANIFEST in names else names)

        files.check_replaceable(folder, "examples", others, overwrite)

    check()
    found = list(examples)
    if not found:
        raise ValueError("there are no examples")
    labels = _in_order({example.label for example in found if example.label is not None})
    order = _order(len(found), seed)
    if undersample:
        order = _undersampled(order, [example.label for example in found], seed)
        more = {"dropped": len(found) - len(order), **(more or {})}
    sizes = _sizes(len(order), val_fraction, test_fraction)
    fields: dict[str, Any] = {"n_vocab": tokenizer.n_vocab, "tokenizer_sha256": fingerprint(tokenizer), "seed": seed}
    fields |= {"val_fraction": val_fraction, "test_fraction": test_fraction, "labels": labels, **(more or {})}
    with files.replacing(folder, check) as temporary:
        at = 0
        for split in ("val", "test", "train"):  # the train split is the rest
            chosen = [found[i] for i in sorted(order[at : at + sizes[split]])]
            at += sizes[split]
            if chosen:
                _write_split(temporary, split, chosen, labels, id_dtype(tokenizer.n_vocab))
            fields[split] = _counts(chosen, labels)
        fields["sha256"] = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        text = json.dumps({"gpt2_jax_examples": VERSION} | fields, indent=1, ensure_ascii=False)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return open_examples(folder, tokenizer)


def _write_split(folder: Path, split: str, examples: Sequence[Example], labels: Sequence[str], dtype: np.dtype) -> None:
    ends = np.cumsum([len(example.ids) for example in examples])
    np.concatenate([example.ids for example in examples]).astype(dtype).tofile(folder / f"{split}.bin")
    ends.astype("<i8").tofile(folder / f"{split}.ends.bin")
    if labels:
        numbers = [labels.index(str(example.label)) for example in examples]
        np.asarray(numbers, "<i4").tofile(folder / f"{split}.labels.bin")
    else:
        masks = [np.asarray(example.counts, np.uint8) for example in examples]
        np.concatenate(masks).tofile(folder / f"{split}.mask.bin")
    kept = [example.record for example in examples if example.record is not None]
    if split == "test" and kept:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        (folder / f"{split}.records.jsonl").write_text("".join(lines), encoding="utf-8", errors="surrogatepass")


def _in_order(labels: Iterable[str]) -> list[str]:
    """Return labels in the order of their numbers: by value if all are whole numbers, else by name."""
    labels = sorted(labels)
    try:
        return sorted(labels, key=int)
    except ValueError:
        return labels


def _counts(examples: Sequence[Example], labels: Sequence[str]) -> dict[str, Any]:
    lengths = [len(example.ids) for example in examples]
    counts: dict[str, Any] = {"examples": len(examples), "tokens": sum(lengths), "longest": max(lengths, default=0)}
    if labels:
        counts["by_label"] = {label: sum(example.label == label for example in examples) for label in labels}
    else:
        counts["targets"] = sum(int(np.asarray(example.counts).sum()) for example in examples)
    return counts


def _order(n: int, seed: int, stream: int = 2**32) -> np.ndarray:
    """Return the numbers of n examples in random order. Each stream of a seed has another one."""
    return np.argsort(np.random.Philox(key=[seed, stream]).random_raw(n), kind="stable")


def _undersampled(order: np.ndarray, labels: Sequence[str | None], seed: int) -> np.ndarray:
    """Return as many examples of each label as of the rarest one, drawn at random, in random order."""
    n_rarest = min(labels.count(label) for label in set(labels))
    seen: dict[str | None, int] = {}
    kept = []
    for i in order:
        seen[labels[i]] = seen.get(labels[i], 0) + 1
        if seen[labels[i]] <= n_rarest:
            kept.append(i)
    # The frequent labels came first: they had reached their number before the rarest one was seen as often.
    return np.asarray(kept)[_order(len(kept), seed, 2**32 + 1)]


def _sizes(n: int, val_fraction: float, test_fraction: float) -> dict[str, int]:
    sizes = {
        split: max(round(n * share), 1) if share else 0
        for split, share in (("val", val_fraction), ("test", test_fraction))
    }
    sizes["train"] = n - sum(sizes.values())
    if sizes["train"] < 1:
        raise ValueError(f"{n} examples are too few for a split into training, validation and test")
    return sizes
