"""Devices that are not there: what XLA needs to know of an accelerator to compile for it.

JAX reads the environment when it is imported, so `ENVIRONMENT` must be set before. This module does not import JAX.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import Any

ENVIRONMENT = {
    # Otherwise JAX tries to start the TPU and CUDA backends that it finds installed.
    "JAX_PLATFORMS": "cpu",
    # Otherwise libtpu asks the metadata server of Google Cloud which TPU the machine has.
    "TPU_SKIP_MDS_QUERY": "1",
    # Otherwise libtpu refuses to run in two processes at once, since a chip can serve only one.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # The compile time is reported.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}

# The smallest slice of each generation that libtpu describes. A program for one device uses its first chip.
TPU = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
MOST_DEVICES = 4  # the chips of these slices
TARGETS = ("cpu", "h200", *TPU)

# A GpuTargetConfigProto. XLA chooses kernels and their tiles by these figures. XLA's own description of this GPU is
# xla/backends/gpu/target_config/specs/h200.txtpb in openxla/xla.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


def missing(target: str) -> str | None:
    """Return a sentence that says what to install to compile for a target; None if everything is there."""
    if target in TPU and not _version("libtpu"):
        return f"compiling for a {target} needs libtpu: pip install --no-deps '{wanted('libtpu', 'tpu')}'"
    if target == "h200" and not _version("jax-cuda13-plugin"):
        plugin = wanted("jax-cuda13-plugin[with-cuda]", "cuda13")
        return f"compiling for an H200 needs JAX's CUDA plugin (3.9 GB): pip install '{plugin}'"
    return None


def wanted(package: str, extra: str) -> str:
    """Return the requirement that the installed JAX has for a package in one of its extras."""
    for line in importlib.metadata.requires("jax") or []:
        requirement, _, marker = line.partition(";")
        if requirement.startswith(package) and re.search(rf"""extra == ["']{extra}["']""", marker):
            return re.sub(r"<=([^,]+),>=\1$", r"==\1", requirement.strip())
    return package


def versions(targets: list[str]) -> list[str]:
    """Return name and version of the packages that compile for these targets."""
    packages = ["libtpu"] * any(target in TPU for target in targets)
    packages += ["jax-cuda13-plugin", "nvidia-cudnn-cu13"] * ("h200" in targets)
    return [f"{package} {_version(package)}" for package in packages]


def _version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(n_devices: int) -> dict[str, str]:
    """Return the environment of a process that compiles for up to this many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n_devices}"
    return ENVIRONMENT | ({"XLA_FLAGS": flags} if n_devices > 1 else {})


def devices(target: str, n_devices: int = 1) -> list[Any]:
    """Return devices of a target, to put into the sharding of abstract arguments. Only CPUs can run programs.

    GPUs are in one machine. At most MOST_DEVICES are there of each target.
    """
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices("cpu")[:n_devices]
    if target in TPU:
        return topologies.get_topology_desc(TPU[target], platform="tpu").devices[:n_devices]
    _let_gpu_mean_cuda()
    return topologies.get_topology_desc(platform="cuda", topology=f"1x1x{n_devices}", target_config=H200).devices


def _let_gpu_mean_cuda() -> None:
    """Let JAX take "gpu" for "cuda", for the rest of the process.

    The devices of the topology say that their platform is "gpu". JAX looks for a running backend to find out whether
    this is CUDA or ROCm, and there is none.
    """
    from jax._src import xla_bridge

    of_backends = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name == "gpu" else of_backends(name)
