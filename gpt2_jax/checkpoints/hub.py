"""Models of the Hugging Face hub, through huggingface_hub and its own cache."""

from __future__ import annotations

from pathlib import Path

from gpt2_jax.checkpoints.integrity import one_line
from gpt2_jax.tokenizer import ADDED_TOKENS, HUGGING_FACE_FILES, TOKENIZER_CONFIG

TOKENIZER_FILES = ("config.json", *HUGGING_FACE_FILES, TOKENIZER_CONFIG, ADDED_TOKENS)
MODEL_FILES = (*TOKENIZER_FILES, "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def fetch(repository: str, tokenizer_only: bool = False) -> Path:
    """Return the folder of a repository in the hub's cache, having fetched the files of Hugging Face's form.

    Raises:
      FileNotFoundError: no such repository, or it may not be read.
      ValueError: it holds no safetensors.
      ConnectionError: the hub cannot be reached, and the files are not in its cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    files = TOKENIZER_FILES if tokenizer_only else MODEL_FILES
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        told = f"{repository} is no directory here, and no model of the Hugging Face hub that may be read"
        raise FileNotFoundError(f"{told}: {one_line(error)}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        told = f"{repository} is no directory here, and cannot be fetched from the Hugging Face hub"
        raise ConnectionError(f"{told}: {one_line(error)}") from error
    if not tokenizer_only and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{repository} holds no model.safetensors; pickled weights (pytorch_model.bin) can run code when opened "
            "and are not read; a copy that can not is made by: python -c 'from transformers import GPT2LMHeadModel "
            f'as M; M.from_pretrained("{repository}").save_pretrained("a-folder")\''
        )
    return folder
