"""The fingerprint of a model: what tells two models apart, however and wherever they are stored."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json

import numpy as np

from gpt2_jax.checkpoints import integrity
from gpt2_jax.config import DROPOUT_RATES, GPT2Config
from gpt2_jax.params import Params, flatten

# Dropout rates have no effect, the dtypes are the tensors', and each program chooses its own kind of attention.
NOT_COMPARED = {*DROPOUT_RATES, "param_dtype", "compute_dtype", "attention"}


def fingerprint(config: GPT2Config, params: Params) -> str:
    """Return the sha256 of a model's weights and hyperparameters, in hexadecimal.

    It does not depend on the format or the folder that the model was read from. It reads every byte, with several
    threads: about 0.5 s for 124M on two cores.

    Args:
      config: the hyperparameters. Dropout rates, the compute dtype and the kind of attention do not count; fields with
        their default are left out, so that a field that a later version adds changes nothing.
      params: the weights, in any dtype.
    """
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in NOT_COMPARED and getattr(config, field.name) != field.default
    }
    flat = flatten(params)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
        hashes = pool.map(lambda leaf: integrity.sha256(np.asarray(leaf)), flat.values())
        tensors = {
            name: [leaf.dtype.name, list(leaf.shape), found]
            for (name, leaf), found in zip(flat.items(), hashes, strict=True)
        }
    return hashlib.sha256(json.dumps([fields, tensors], sort_keys=True).encode()).hexdigest()
