"""A single changed byte anywhere in a model's files is reported, or does not affect what is loaded.

`pytest -s` prints its counts.
"""

import collections
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import checkpoint_forms as forms
import foreign_models as foreign
import numpy as np
import pytest
from checkpoint_forms import DATA, SAFETENSORS
from strength import campaign

import gpt2_jax
from gpt2_jax.checkpoints import integrity, parts
from gpt2_jax.config import DROPOUT_RATES

# About 20 kB, so that changes hit names, shapes and offsets often. n_head is 3; one byte can make it 1, 2, 4 or 6.
CONFIG = gpt2_jax.GPT2Config(n_vocab=37, n_ctx=11, n_embd=12, n_head=3, n_layer=2)
SUBJECTS = ("tensorflow", "huggingface", "orbax", "copy", "tensorflow v1", "flax", "llm.c", "orbax tree")
NO_CHECKSUMS = ("flax", "llm.c", "orbax tree")  # a changed weight is another weight, and nobody can tell
# What nothing else in a format depends on. llm.c pads the rows, so its file has the same length for other n_vocab.
UNCHECKED = dict.fromkeys(("tensorflow", "tensorflow v1", "flax", "orbax tree"), ("n_head",)) | {
    "llm.c": ("n_head", "n_vocab")
}
SUPPORT = str(Path(__file__).parents[1] / "support")


class Subject:
    """A small model in one format, whose files can be damaged and restored. "copy" is the kept copy of TensorFlow's."""

    def __init__(self, form: str, folder: Path):
        self.form, self.flat = form, forms.random_model(CONFIG)
        self.source, cache = folder / "model", folder / "cache"
        if form in ("tensorflow", "copy"):
            forms.write_tensorflow(self.source, CONFIG, self.flat)
        elif form in FOREIGN:
            FOREIGN[form](self.source, CONFIG, self.flat)
        else:
            gpt2_jax.save(self.source, CONFIG, forms.nested(self.flat), format=form)
        self.environment = {"GPT2_JAX_CACHE": str(cache), "GPT2_JAX_KEEP_COPY": str(int(form == "copy"))}
        self.config = self.load()[0]
        self.directory = cache / "copies" if form == "copy" else self.source
        self.files = self._read()
        assert self.files, f"{self.directory} holds no files"

    def _read(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(self.directory.rglob("*")) if path.is_file()}

    def load(self):
        with mock.patch.dict(os.environ, self.environment), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gpt2_jax.load(self.source)

    def outcome(self, damaged: dict[Path, bytes | None]) -> str:
        """Return the result of `load` after these changes to files (None: removed). Restore the files afterwards.

        "told" (an error), "rebuilt" (the copy), "harmless" (the same arrays and config), "unknowable" (n_head in
        OpenAI's hparams.json, which nothing else in that format depends on; in a format without checksums a weight, or
        one of `UNCHECKED`), or a text that says what went wrong.
        """
        for path, content in damaged.items():
            path.unlink() if content is None else path.write_bytes(content)
        try:
            config, params = self.load()
        except (ValueError, FileNotFoundError) as error:
            return "told" if forms.is_clear(error) and self.form != "copy" else f"told badly: {error!r}"
        except Exception as error:  # the wrong type of error: counted and shown
            return f"escaped: {error!r}"
        else:
            # Users may change dropout rates in Hugging Face's config.json. They do not affect the weights.
            has_rates = self.form in ("huggingface", "flax")
            rates = {name: getattr(self.config, name) for name in DROPOUT_RATES} if has_rates else {}
            unchecked = {name: getattr(self.config, name) for name in UNCHECKED.get(self.form, ())}
            if config.replace(**rates | unchecked) != self.config:
                return f"SILENT: {config}"
            difference = forms.difference(params, self.flat)
            if difference and self.form not in NO_CHECKSUMS:
                return f"SILENT: {difference}"
            if difference or config.replace(**rates) != self.config:
                return "unknowable"
            return "rebuilt" if self.form == "copy" and self._rebuilt(damaged) else "harmless"
        finally:
            self._heal()

    def _rebuilt(self, damaged) -> bool:
        return any(not path.is_file() or path.read_bytes() != content for path, content in damaged.items())

    def _heal(self):
        for path in self._read().keys() - self.files.keys():
            path.unlink()
        for path, content in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)

    def flip(self, place: int, change: int) -> tuple[Path, bytes]:
        """Return a file and its content with one byte changed. `place` counts the bytes of all files."""
        for path, content in self.files.items():
            if place < len(content):
                return path, content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]
            place -= len(content)
        raise IndexError(place)

    def tensor_data(self) -> list[int]:
        """Return the places, as in `flip`, of the bytes that are only weights."""
        places, start = [], 0
        for path, content in self.files.items():
            if path.name in (DATA, "model.ckpt"):
                places += range(start, start + len(content))
            elif path.suffix == ".safetensors":
                (header,) = struct.unpack("<Q", content[:8])
                places += range(start + 8 + header, start + len(content))
            start += len(content)
        return places


FOREIGN = {
    "tensorflow v1": foreign.write_v1_folder,
    "flax": foreign.write_flax,
    "llm.c": lambda directory, config, flat: foreign.write_llmc(directory / "model.bin", config, flat),
    "orbax tree": foreign.write_orbax,
}


def outcomes(form: str, n: int, seed: int) -> dict[str, int]:
    """Change one random byte anywhere in the files of a model in this format, n times. Count the results of load."""
    rng, counts = np.random.default_rng(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(form, Path(folder))
        size = sum(map(len, subject.files.values()))
        for _ in range(n):
            path, content = subject.flip(int(rng.integers(size)), int(rng.integers(1, 256)))
            counts[subject.outcome({path: content})] += 1
    return dict(counts)


# When Orbax fails, it leaves tasks that log errors later. Only one test below checks that.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request, tmp_path_factory):
    forms.import_tensorflow()
    return Subject(request.param, tmp_path_factory.mktemp(request.param))


ACCEPTABLE = {
    "tensorflow": {"told", "harmless", "unknowable"},
    "huggingface": {"told", "harmless"},
    "orbax": {"told", "harmless"},
    "copy": {"rebuilt", "harmless"},
    "tensorflow v1": {"told", "harmless", "unknowable"},
    **{form: {"told", "harmless", "unknowable"} for form in NO_CHECKSUMS},
}


@pytest.mark.parametrize("form", SUBJECTS)
def test_changed_bytes(form):
    forms.import_tensorflow()
    n = campaign(60, 200)
    counts = outcomes(form, n, seed=20)
    print(f"\n{form}: {counts}")
    assert counts.keys() <= ACCEPTABLE[form], counts
    assert sum(counts.values()) == n
    if form not in NO_CHECKSUMS:
        assert counts.get("told", 0) + counts.get("rebuilt", 0) > n / 2  # most bytes are weights


def test_a_changed_byte_of_a_weight_is_always_noticed(subject):
    """No flip is missed: 97 flips in the weights, of the lowest and of the highest bit."""
    if subject.form == "orbax":
        pytest.skip("Orbax compresses: see the test of a whole other tree of params")
    if subject.form in NO_CHECKSUMS:
        pytest.skip("there are no checksums")
    places = subject.tensor_data()
    rng = np.random.default_rng(7)
    for place in rng.choice(places, 97, replace=False):
        path, content = subject.flip(int(place), 1 << int(rng.integers(8)))
        assert subject.outcome({path: content}) in ("told", "rebuilt"), (path.name, place)


def test_a_changed_name_or_size_is_noticed_without_checksums(subject):
    """Names in the files of Flax and Orbax, and the sizes in llm.c's header. Orbax writes each name twice."""
    if subject.form not in NO_CHECKSUMS:
        pytest.skip("there are checksums")
    told = n = 0
    for path, content in subject.files.items():
        places = [match.start() for match in re.finditer(rb"c_attn|ln_1|c_fc", content)]
        for place in (8, 16, 24) if subject.form == "llm.c" else places:  # n_ctx, n_layer, n_embd
            other = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            outcome = subject.outcome({path: other})
            assert outcome in ACCEPTABLE[subject.form], (path.name, place, outcome)
            told, n = told + (outcome == "told"), n + 1
    print(f"\n{subject.form}: {told} of {n}")
    assert told >= {"flax": n, "llm.c": 3, "orbax tree": 12}[subject.form] > 1  # 12: each name once


def test_each_byte_of_the_texts(subject):
    """Every byte, or every seventh: a digit becomes another digit, a letter another letter."""
    counts = collections.Counter()
    for path, content in subject.files.items():
        if path.suffix == ".json" or path.name == "checkpoint":
            for place in range(0, len(content), campaign(7, 1)):
                change = 1 + place % 2
                other = content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]
                outcome = subject.outcome({path: other})
                counts[outcome] += 1
                assert outcome in ACCEPTABLE[subject.form], (path.name, other[max(0, place - 30) : place + 9], outcome)
    if not counts:
        pytest.skip("a copy is one safetensors file")
    print(f"\n{subject.form}: {dict(counts)}")


def test_each_file_cut_off_emptied_grown_or_gone(subject):
    for path, content in subject.files.items():
        for other in (content[:-1], content[: len(content) // 2], content[:8], b"", content + b"\0", None):
            if other == content:
                continue
            assert subject.outcome({path: other}) in ACCEPTABLE[subject.form], (path.name, other and len(other))


def test_a_run_of_zeros_and_a_block_in_another_place(subject):
    """File systems and interrupted copies can leave 512 zero bytes, or 512 bytes of the previous block."""
    for path, content in subject.files.items():
        for start in range(512, len(content) - 512, 512 * 3):
            for block in (bytes(512), content[start - 512 : start]):
                other = content[:start] + block + content[start + 512 :]
                assert subject.outcome({path: other}) in ACCEPTABLE[subject.form], (path.name, start)


def test_damage_is_told_without_noise():
    """There is only the exception: no traceback and no library log on standard error, even at the process's end."""
    run = f"import test_corruption; [test_corruption.outcomes(form, 40, seed=3) for form in {SUBJECTS}]"
    done = subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", "-c", run],
        cwd=Path(__file__).parent,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([SUPPORT, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "TF_ENABLE_ONEDNN_OPTS": "0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    noise = [line for line in done.stderr.splitlines() if not re.match(r"WARNING: All log|[IWE]\d{4} ", line)]
    assert noise == [], f"{len(noise)} lines, among them {noise[:3]}"


@pytest.mark.parametrize("kind", ["Task", "Future", "_GatheringFuture"])  # asyncio names the class
def test_late_errors_of_orbax_are_not_logged_and_others_are(kind):
    def is_logged(text):
        return parts._is_not_of_orbax(logging.makeLogRecord({"msg": text}))

    assert not is_logged(
        f"{kind} exception was never retrieved\nfuture: <{kind} finished exception=ValueError(tensorstore)>"
    )
    assert is_logged(f"{kind} exception was never retrieved\nfuture: <{kind} finished exception=ValueError('other')>")
    assert is_logged("the event loop of orbax is slow")


def test_names_exchanged_in_our_safetensors(tmp_path):
    """Two tensors of the same shape are swapped: every byte of the weights is still there."""
    subject = Subject("huggingface", tmp_path)
    path = next(path for path in subject.files if path.name == SAFETENSORS)
    content = subject.files[path]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first, second = (name for name in header if name.endswith(("h.0.ln_1.weight", "h.1.ln_1.weight")))
    header[first], header[second] = header[second], header[first]
    text = json.dumps(header).encode()
    assert subject.outcome({path: struct.pack("<Q", len(text)) + text + content[8 + length :]}) == "told"


@pytest.mark.parametrize("form", ["huggingface", "orbax"])
def test_another_number_of_heads_in_our_export(tmp_path, form):
    """No shape depends on it, so only our own record of the config can detect it."""
    subject, changed = Subject(form, tmp_path), 0
    for path, content in subject.files.items():
        for old in (b'"n_head": 3', b'"n_head":3'):
            if path.suffix == ".json" and old in content:
                assert subject.outcome({path: content.replace(old, old[:-1] + b"4")}) == "told", path.name
                changed += 1
    assert changed


def test_a_whole_other_tree_in_our_orbax_directory(tmp_path):
    """Valid Orbax files with weights that differ in one bit: only our own hashes can detect it."""
    subject = Subject("orbax", tmp_path / "a")
    flat = {name: array.copy() for name, array in subject.flat.items()}
    flat["h1/mlp/c_proj/b"].view(np.uint32)[5] ^= 1
    gpt2_jax.save(tmp_path / "b", CONFIG, forms.nested(flat), format="orbax")
    shutil.rmtree(subject.source / "params")
    shutil.copytree(tmp_path / "b" / "params", subject.source / "params")
    with pytest.raises(ValueError, match=r"params is damaged: .* is not what was written"):
        subject.load()
    ours, theirs = (json.loads((path / "gpt2_jax.json").read_text()) for path in (subject.source, tmp_path / "b"))
    text = integrity.write_manifest(subject.config, ours["sha256"], files=theirs["files"])
    (subject.source / "gpt2_jax.json").write_text(text)
    with pytest.raises(ValueError, match=r"h1/mlp/c_proj/b"):  # the files' hashes match, the tensor's hash does not
        subject.load()
    shutil.copyfile(tmp_path / "b" / "gpt2_jax.json", subject.source / "gpt2_jax.json")
    assert forms.difference(subject.load()[1], flat) == ""


VOCABULARY = {
    "tensorflow": ("encoder.json", "vocab.bpe"),
    "huggingface": ("vocab.json", "merges.txt", "tokenizer.json"),
}


@pytest.mark.parametrize(("format", "name"), [(format, name) for format, names in VOCABULARY.items() for name in names])
def test_a_changed_byte_of_a_vocabulary(tmp_path, tokenizer, format, name):
    """An error of one sentence, a warning, or a tokenizer that works.

    These files have no checksums, because other programs write and read them too. What cannot be found: a token that
    has become another token of the same kind (both in a file that alone holds it), a merge whose parts are still
    tokens, and a setting that has become another valid one.
    """
    config = CONFIG.replace(n_vocab=tokenizer.n_vocab)
    flat = forms.random_model(config)
    gpt2_jax.save(tmp_path, config, forms.nested(flat), format=format, tokenizer=tokenizer)
    path = tmp_path / name
    content, rng, counts = path.read_bytes(), np.random.default_rng(20), collections.Counter()
    for _ in range(campaign(40, 200)):
        place = int(rng.integers(len(content)))
        changed = bytes([content[place] ^ int(rng.integers(1, 256))])
        path.write_bytes(content[:place] + changed + content[place + 1 :])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = gpt2_jax.load_tokenizer(tmp_path)
            except (ValueError, FileNotFoundError) as error:
                counts["told" if forms.is_clear(error) else f"told badly: {error!r}"] += 1
                continue
        assert {warning.category for warning in caught} <= {UserWarning}, (place, changed, caught)
        assert isinstance(found.decode(found.encode("First Citizen:")), str)
        same = found.tokens == tokenizer.tokens and found.merges == tokenizer.merges
        counts["warned" if caught else "same" if same else "another"] += 1
    print(f"\n{name}: {dict(counts)}")
    assert counts["told"]
    assert counts.keys() <= {"told", "warned", "same", "another"}, counts
