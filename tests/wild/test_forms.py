"""Every form of docs/guides/forms.md: the folder is made, opened here and by transformers 5, and compared."""

import importlib.util
import warnings

import checkpoint_forms as forms
import forward
import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
import pytest
import vocabularies
import wild_forms
from wild_forms import FORMS

import gpt2_jax

BOUND = 4e-6  # of the largest logit; measured over all rows: MEASURED here, MEASURED in transformers (float32)
TOKENS = np.random.default_rng(7).integers(0, 256, (2, 29))
EOT = "<|endoftext|>"
HOSTILE = [
    "", "a", "hello", " hello", "hello world", "Hello, World! HELLO", "  two  spaces   three", "trailing \n", "\n\n",
    "\r\n\tx\t", "12345 3.14 1599 007", "abc bc ab cab abcabc", "don't we'll I'm they've 'tis 'S", "a" * 300, " " * 70,
    "Schöne Grüße aus München, Straße", "e\u0301 \xe9 \ufb01 \u2460 \uff21 \u0130 \u01c5 ß", "\u6f22\u5b57\u3053\u3093",
    "\U0001f98a\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff", "\x00\x01\x7f\x80\xff\ufeff\ufffd",
    "def f(x):\n    return x  # comment\n", EOT, f"a{EOT}b", f" {EOT} ", f"{EOT}{EOT}\n{EOT}x", "<|endoftext|",
    "|endoftext|>", "<s>hello</s>", " <s> hello </s> <pad><mask> <unk>", "the <mask> ab <r> x", "[PAD] [PAD]x",
    "ab cab ab", "<nl>\n<nl>", "<speaker1>hi <speaker2> there<speaker1>", "<bos>hi<eos><pad>",
    "<newline>covfefe covfefe\n", "COVFEFE <NEWLINE>",
    "<|im_start|>user\nhi<|im_end|>\n", "To be, or not to be: that is the question.", "".join(vocabularies.SNIPPETS),
]  # fmt: skip


def rows(*kinds: str, refused: bool | None = False, all_parity: bool = False):
    """Return the parameters of a test: the rows of these kinds, with the mark of those that need the parity extra."""
    found = [row for row in FORMS if row.kind in kinds and (refused is None or bool(row.refused) == refused)]
    parity = [all_parity or "torch" in row.needs for row in found]
    marks = [[pytest.mark.parity] if marked else [] for marked in parity]
    return [pytest.param(row, marks=mark, id=row.name) for row, mark in zip(found, marks, strict=True)]


@pytest.fixture(scope="module")
def transformers():
    """The library, quiet and without a network."""
    reason = "needs the `parity` extra: pip install -e '.[parity]'"
    pytest.importorskip("torch", reason=reason)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("transformers", reason=reason)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
        yield library


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """Return `make(row)` -> (folder, source). Each folder is made once."""
    done = {}

    def make(row):
        for library in row.needs:
            if importlib.util.find_spec(library.split(".")[0]) is None:
                pytest.skip(f"{row} needs {library}")
        if "torch" in row.needs:
            request.getfixturevalue("transformers")
        if row not in done:
            folder = tmp_path_factory.mktemp("forms") / "model"  # messages name the file, not the folder
            folder.mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries that write
                done[row] = folder, row.make(folder)
        return done[row]

    return make


def ours(function, *args, **options):
    """Call the package. It may warn, in one sentence each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **options)
    for warning in caught:
        assert warning.category is UserWarning, warning
        assert "\n" not in str(warning.message)
    return result


# ---- here


@pytest.mark.parametrize("row", rows("weights", "both"))
def test_weights_are_the_same_bits_and_logits_are_equal(row, made):
    folder, source = made(row)
    config, params = ours(gpt2_jax.load, folder / row.path, dtype=row.dtype)
    found, expected = forms.leaves(params), dict(source.flat)
    if source.head is not None:
        expected["lm_head"] = source.head
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        leaf = found[name][: source.n_ids] if name == "wte" else found[name]
        assert (leaf.dtype, leaf.shape) == (array.dtype, array.shape), name
        assert leaf.tobytes() == array.tobytes(), name
    logits = forward.logits_of(config, params, TOKENS)[..., : source.n_ids]
    assert forward.relative_error(logits, source.logits(TOKENS)) <= BOUND


@pytest.mark.parametrize("row", rows("vocabulary", "both", all_parity=True))
def test_ids_and_decoded_texts_are_those_of_transformers(row, made, transformers):
    """As `tokenizer(text)["input_ids"]`: special tokens are parsed and templates apply."""
    folder, source = made(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained((source and source.vocabulary) or folder)
    tokenizer = ours(gpt2_jax.load_tokenizer, folder)
    for text in HOSTILE:
        ids = list(theirs(text, verbose=False)["input_ids"])
        assert tokenizer.encode(text, allow_special=True) == ids, text
        decoded = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded == text:
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("row", rows("weights", "vocabulary", refused=True))
def test_what_is_another_model_is_refused_with_one_sentence(row, made):
    folder, _ = made(row)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){row.refused}") as caught:
        (gpt2_jax.load_tokenizer if row.kind == "vocabulary" else gpt2_jax.load)(folder)
    assert forms.is_clear(caught.value), caught.value


# ---- in transformers 5


def opened(transformers, folder):
    """Open a folder as users of transformers do. Return None if that raises, or if weights are missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, report = transformers.GPT2LMHeadModel.from_pretrained(
                folder, output_loading_info=True, dtype="float32", attn_implementation="eager"
            )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError):
            return None
    return None if report["missing_keys"] or report["mismatched_keys"] else model.eval()


@pytest.mark.parametrize("row", rows("weights", "both", refused=None, all_parity=True))
def test_transformers_opens_weights_as_the_table_says(row, made, transformers):
    import torch

    folder, source = made(row)
    model = opened(transformers, folder)
    assert (model is not None) == row.transformers
    if model is not None and source is not None:
        with torch.no_grad():
            theirs = model(torch.tensor(TOKENS)).logits.numpy()
        assert forward.relative_error(theirs, source.logits(TOKENS)) <= BOUND


@pytest.mark.parametrize("row", rows("vocabulary", refused=True, all_parity=True))
def test_transformers_opens_vocabularies_that_are_refused_here(row, made, transformers):
    folder, _ = made(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert transformers.AutoTokenizer.from_pretrained(folder)("one 2")["input_ids"]
    assert row.transformers


# ---- the table


def test_the_page_has_the_rows_of_the_registry():
    """The expected text is what `python tests/support/wild_forms.py` prints."""
    page = (forms_page()).read_text(encoding="utf-8")
    for kind, title in wild_forms.TITLES.items():
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert "\n".join(lines) == wild_forms.table(kind)


def forms_page():
    from commands import ROOT

    return ROOT / "docs" / "guides" / "forms.md"


def test_there_are_forms_of_every_kind():
    counts = {kind: len([row for row in FORMS if row.kind == kind]) for kind in wild_forms.TITLES}
    assert sum(counts.values()) >= 40
    assert min(counts.values()) >= 8
