"""Models on the Hugging Face hub. huggingface_hub fetches them into its own cache."""

from __future__ import annotations

from pathlib import Path

from gpt2_jax.checkpoints.integrity import one_line
from gpt2_jax.tokenizer import ADDED_TOKENS, HUGGING_FACE_FILES, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG

TOKENIZER_FILES = ("config.json", *HUGGING_FACE_FILES, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
MODEL_FILES = (*TOKENIZER_FILES, "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def fetch(repository: str, tokenizer_only: bool = False) -> Path:
    """Fetch a repository's files in Hugging Face's format, and return its folder in the hub's cache.

    Raises:
      FileNotFoundError: the repository does not exist, or access to it is denied.
      ValueError: the repository holds no safetensors.
      ConnectionError: the hub cannot be reached, and the files are not in its cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    files = TOKENIZER_FILES if tokenizer_only else MODEL_FILES
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        message = f"{repository} is not a local directory, and not a model on the Hugging Face hub that you can read"
        raise FileNotFoundError(f"{message}: {one_line(error)}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        message = f"{repository} is not a local directory, and cannot be fetched from the Hugging Face hub"
        raise ConnectionError(f"{message}: {one_line(error)}") from error
    if not tokenizer_only and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{repository} holds no model.safetensors; pickled weights (pytorch_model.bin) are not read, because "
            "opening them can run code; convert them with: python -c 'from transformers import GPT2LMHeadModel "
            f'as M; M.from_pretrained("{repository}").save_pretrained("a-folder")\''
        )
    return folder
