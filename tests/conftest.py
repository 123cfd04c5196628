"""Fixtures for all tests: the embedded model, its tokenizer, and results of the original code with that model."""

import importlib.util
import os
import signal
from pathlib import Path

import forward
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
import strength

import gpt2_jax


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="campaigns at full strength: every kill, call, example and case"
    )


def pytest_configure(config):
    strength.FULL = config.getoption("full")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job; commands that tests start would ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # XLA compiles each program in one part: the processes of pytest use all cores already.
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_parallel_codegen_split_count=1"]
    if not strength.FULL and jax.version.__version_info__ < (0, 11):  # jax 0.12: XLA aborts on this flag
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    examples = strength.campaign(12, 60)
    hypothesis.settings.register_profile("gpt2_jax", deadline=None, max_examples=examples)  # a first call compiles
    hypothesis.settings.load_profile("gpt2_jax")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("parity") and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        pytest.skip("needs the `parity` extra: pip install -e '.[parity]'")


def pytest_report_header(config):
    return "campaigns: at full strength" if strength.FULL else "campaigns: small; --full runs them at full strength"


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """Keep downloads and copies out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _float32_products():
    """Compute float32 products in float32. By default GPUs round them to TF32 and TPUs to bfloat16; CPUs do not.

    So on a CPU, tests run at the default precision, as users do. There, "highest" would make the model sum in blocks.
    """
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file(request):
    """Let XLA compile without optimization, here and in processes that tests start: compilation takes the most time.

    Such programs are slower and round differently. With --full, the tests in `OPTIMIZED` run the programs of users.
    The programs of a file are freed at its end: those of all files take gigabytes.
    """
    quickly = not strength.FULL or strength.OPTIMIZED.isdisjoint((request.path.parent.name, request.path.stem))
    jax.config.update("jax_disable_most_optimizations", quickly)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quickly)))
        yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return gpt2_jax.embedded_model()


@pytest.fixture(scope="session")
def shakespeare(model_dir):
    """(config, params) of the embedded model."""
    return gpt2_jax.load(model_dir)


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    return gpt2_jax.load_tokenizer(model_dir)


@pytest.fixture(scope="session")
def reference() -> dict[str, np.ndarray]:
    """Return tokens [4, 97], their logits [4, 97, 1281] and greedy [2, 129], computed by OpenAI's TensorFlow graph."""
    with np.load(Path(__file__).parent / "fixtures" / "shakespeare_reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, numpy_reference.random_params(forward.CONFIG, np.random.default_rng(3)))


@pytest.fixture(scope="module", params=["shakespeare", "gpt2"])
def vocabulary(request, model_dir):
    """Return the embedded vocabulary, then GPT-2's own."""
    import vocabularies  # needs Hugging Face tokenizers, which no other test does

    own = request.param == "shakespeare"
    return vocabularies.read_vocabulary(model_dir if own else vocabularies.real_vocabulary_dir())


@pytest.fixture(scope="module")
def real():
    """GPT-2's own vocabulary."""
    import vocabularies

    return vocabularies.read_vocabulary(vocabularies.real_vocabulary_dir())
