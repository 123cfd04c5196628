"""Models on the Hugging Face hub. huggingface_hub fetches them into its own cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2_jax.checkpoints import peft, pickles
from gpt2_jax.checkpoints.integrity import one_line
from gpt2_jax.tokenizer import ADDED_TOKENS, HUGGING_FACE_FILES, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG

TOKENIZER_FILES = ("config.json", peft.CONFIG, *HUGGING_FACE_FILES, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
MODEL_FILES = (*TOKENIZER_FILES, "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
FLAX_FILES = ("flax_model.msgpack", "flax_model.msgpack.index.json", "flax_model-*-of-*.msgpack")
WEIGHTS = (".bin", ".pt", ".h5", ".msgpack", ".gguf", ".safetensors", ".onnx")


OWNERS = {  # of models that people name without their owner
    "distilgpt2": "distilbert",
    "DialoGPT-small": "microsoft",
    "DialoGPT-medium": "microsoft",
    "DialoGPT-large": "microsoft",
    "german-gpt2": "dbmdz",
    "tiny-gpt2": "sshleifer",
    "gpt2-chinese-cluecorpussmall": "uer",
    "codeparrot": "codeparrot",
    "codeparrot-small": "codeparrot",
    "gpt2-small-spanish": "datificate",
}


def fetch(repository: str, tokenizer_only: bool = False, revision: str | None = None) -> Path:
    """Fetch a repository's files in Hugging Face's format, and return its folder in the hub's cache.

    flax_model.msgpack is fetched only if the repository has no safetensors.

    Raises:
      FileNotFoundError: the repository or the revision does not exist, or access to it is denied.
      ValueError: the repository holds no weights that can be read.
      ConnectionError: the hub cannot be reached, and the files are not in its cache.
    """
    if tokenizer_only:
        return _snapshot(repository, revision, TOKENIZER_FILES)
    folder = _snapshot(repository, revision, MODEL_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    names = [] if any(folder.glob("*.msgpack")) else _list_files(repository, revision)
    if not names or any(name in FLAX_FILES for name in names):
        return _snapshot(repository, revision, (*TOKENIZER_FILES, *FLAX_FILES))
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if peft.WEIGHTS in names:
        return _snapshot(repository, revision, (*TOKENIZER_FILES, peft.WEIGHTS))
    adapters = [name for name in weights if name in pickles.ADAPTERS]
    if adapters and not any(name.startswith("pytorch_model") for name in weights):
        raise ValueError(f"{repository} holds {adapters[0]}: {pickles.PICKLED_ADAPTER}")
    listed = ", ".join(weights) or "no weights"
    arguments = f'"{repository}"' + (f', revision="{revision}"' if revision else "")
    raise ValueError(
        f"{repository} holds no model.safetensors; found: {listed}; pickled weights (pytorch_model.bin) are not read, "
        "because opening them can run code; convert them with: python -c 'from transformers import GPT2LMHeadModel "
        f'as M; M.from_pretrained({arguments}).save_pretrained("a-folder")\''
    )


def _snapshot(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    import huggingface_hub

    with _clear_errors(repository, "vocabulary is" if files is TOKENIZER_FILES else "weights are"):
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))


def _list_files(repository: str, revision: str | None) -> list[str]:
    """Return the names of a repository's files.

    Raises:
      ConnectionError: the hub cannot be reached. Then the cache holds only the tokenizer's files, or nothing.
    """
    import huggingface_hub

    with _clear_errors(repository):
        return huggingface_hub.HfApi().list_repo_files(repository, revision=revision)


@contextlib.contextmanager
def _clear_errors(repository: str, what: str = "weights are") -> Iterator[None]:
    """Turn the errors of huggingface_hub into one sentence."""
    from huggingface_hub import errors

    unknown = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    try:
        yield
    except unknown as error:
        message = f"{repository} is not a local directory, and not a model on the Hugging Face hub that you can read"
        raise FileNotFoundError(f"{message}: {one_line(error)}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        message = (
            f"{repository} is not a local directory, its {what} not in the hub's cache, and the Hugging Face hub "
            "cannot be reached"
        )
        raise ConnectionError(f"{message}: {one_line(error)}") from error
