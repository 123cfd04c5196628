"""Fixtures for the tests of wild forms: transformers, and the folders, each made once."""

import importlib.util
import warnings

import pytest
from wild_checks import REASON


@pytest.fixture(scope="module")
def transformers():
    """The library, quiet and without a network."""
    pytest.importorskip("torch", reason=REASON)
    with pytest.MonkeyPatch.context() as patch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what an import says is not about our files
            library = pytest.importorskip("transformers", reason=REASON)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        logging = library.utils.logging
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield library
        logging.set_verbosity(before)
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """Return `make(row)` -> (folder, source)."""
    done = {}

    def make(row):
        for library in row.needs:
            if importlib.util.find_spec(library.split(".")[0]) is None:
                pytest.skip(f"{row} needs {library}")
        if "transformers" in row.needs:
            request.getfixturevalue("transformers")
        if row not in done:
            folder = tmp_path_factory.mktemp("forms") / "model"  # messages name the file, not the form
            folder.mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries that write
                done[row] = folder, row.make(folder)
        return done[row]

    return make
