"""Models of the Hugging Face hub, through huggingface_hub and its own cache."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_FILES = ("config.json", "vocab.json", "merges.txt", "tokenizer.json")
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
        if not tokenizer_only and not any(folder.glob("*.safetensors")):
            held = ", ".join(sorted(huggingface_hub.list_repo_files(repository))[:20])
            raise ValueError(
                f"{repository} holds no model.safetensors ({held}); pickled weights can run code when opened "
                "and are not read; a copy that can not is made by: python -c 'from transformers import GPT2LMHeadModel "
                f'as M; M.from_pretrained("{repository}").save_pretrained("a-folder")\''
            )
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        told = f"{repository} is no directory here, and no model of the Hugging Face hub that may be read"
        raise FileNotFoundError(f"{told}: {_line(error)}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        told = f"{repository} is no directory here, and cannot be fetched from the Hugging Face hub"
        raise ConnectionError(f"{told}: {_line(error)}") from error
    return folder


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
