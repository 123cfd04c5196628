"""What the tests of tests/wild share: texts and tokens, the rows of a test, and how transformers opens a folder."""

import warnings

import numpy as np
import pytest
import vocabularies
from wild_forms import FORMS

REASON = "needs the `parity` extra: pip install -e '.[parity]'"
BOUND = 4e-6  # of the largest logit; measured 1.1e-6 over all forms
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
    "<newline>covfefe covfefe\n", "COVFEFE <NEWLINE>", "<|im_start|>user\nhi<|im_end|>\n",
    "To be, or not to be: that is the question.", "".join(vocabularies.SNIPPETS),
]  # fmt: skip


def rows(*kinds: str, refused: bool | None = False, all_parity: bool = False):
    """Return the parameters of a test: the rows of these kinds, with the mark of those that need the parity extra."""
    found = [row for row in FORMS if row.kind in kinds and (refused is None or bool(row.refused) == refused)]
    parity = [all_parity or "torch" in row.needs for row in found]
    marks = [[pytest.mark.parity] if marked else [] for marked in parity]
    return [pytest.param(row, marks=mark, id=row.name) for row, mark in zip(found, marks, strict=True)]


def ours(function, *args, **options):
    """Call the package. It may warn, in one sentence each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **options)
    for warning in caught:
        assert warning.category is UserWarning, warning
        assert "\n" not in str(warning.message)
    return result


def opened(transformers, folder):
    """Open weights as users of transformers do. Return None if that raises, or if weights are missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, report = transformers.GPT2LMHeadModel.from_pretrained(
                folder, output_loading_info=True, dtype="float32", attn_implementation="eager"
            )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError):
            return None
    return None if report["missing_keys"] or report["mismatched_keys"] else model.eval()


def logits(model) -> np.ndarray:
    """Logits of TOKENS by a model of transformers."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def tokenizer_of(transformers, folder):
    """Open a vocabulary as users of transformers do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(folder)


def ids(theirs, text: str) -> list[int]:
    """The ids that transformers gives to a text: special tokens are parsed and templates apply."""
    return list(theirs(text, verbose=False)["input_ids"])
