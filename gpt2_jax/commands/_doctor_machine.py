"""What `gpt2-doctor` reports about the machine: system, memory, JAX's devices, and accelerators that JAX misses."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax.commands._doctor_packages import ACCELERATORS, Item, install_line, pip_install, version

VARIABLES = (
    *("GPT2_JAX_CACHE", "GPT2_JAX_BASE_URL", "GPT2_JAX_KEEP_COPY", "XDG_CACHE_HOME"),
    *("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_ENABLE_X64"),
    *("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES"),
)
"""Environment variables that change what the commands do."""
CUDA_13_DRIVER = 580  # the first driver for Linux that runs CUDA 13
DEVICES = Path("/dev")
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")


def system() -> dict[str, Any]:
    """Return os, machine, processors, usable_processors, memory_bytes, available_bytes, environment; unknown: None."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "os": platform.platform(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "usable_processors": usable,
        "memory_bytes": _pages("SC_PHYS_PAGES"),
        "available_bytes": _available(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _pages(name: str) -> int | None:
    """Return memory pages in bytes. None on Windows, which has no sysconf, and on macOS for one of the names."""
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _available() -> int | None:
    """Return the bytes of memory that programs can get. On Linux they include file cache that Linux would free."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else _pages("SC_AVPHYS_PAGES")


def devices() -> dict[str, Any]:
    """Return what JAX computes on.

    Returns:
      backend: "cpu", "gpu", "tpu", or None if JAX does not start; devices: id, platform, kind, memory_bytes and
      used_bytes of each (None if the device does not report them); items: problems, each with what to do.
    """
    if "jax" not in sys.modules:  # the report must not take most of a GPU's memory, as JAX does by default
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax

        found, backend = jax.devices(), jax.default_backend()
    except (ImportError, RuntimeError) as error:
        message = " ".join(str(error).split())
        do = "unset JAX_PLATFORMS" if "JAX_PLATFORMS" in os.environ else pip_install("--upgrade", "jax")
        item = {"problem": f"JAX does not start: {message}", "do": do}
        return {"backend": None, "devices": [], "items": [item, *unseen(set())]}
    items = unseen({device.platform for device in found})
    return {"backend": backend, "devices": [_device(device) for device in found], "items": items}


def _device(device: Any) -> dict[str, Any]:
    try:
        memory = device.memory_stats() or {}
    except RuntimeError:  # from XLA, if a device has no statistics
        memory = {}
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_bytes": memory.get("bytes_limit"),
        "used_bytes": memory.get("bytes_in_use"),
    }


def unseen(platforms: Collection[str]) -> list[Item]:
    """Return a problem for each accelerator that the machine seems to have and that JAX does not see.

    Args:
      platforms: the platforms of the devices that JAX sees: "cpu", "gpu", "tpu".
    """
    items = []
    if (sign := nvidia_sign()) and "gpu" not in platforms:
        driver = _driver()
        is_new = driver is None or driver >= CUDA_13_DRIVER
        extras = ("cuda13", "cuda12") if is_new else ("cuda12",)
        items.append(_missed("an NVIDIA GPU", sign, extras, ("cuda", "gpu")))
    if (sign := tpu_sign()) and "tpu" not in platforms:
        items.append(_missed("a TPU", sign, ("tpu",), ("tpu",)))
    return items


def nvidia_sign() -> str | None:
    """Return the file or program that suggests an NVIDIA GPU; None if there is no such sign."""
    if (DEVICES / "nvidia0").exists():
        return str(DEVICES / "nvidia0")
    return "nvidia-smi" if shutil.which("nvidia-smi") else None


def tpu_sign() -> str | None:
    """Return the file or package that suggests a TPU; None if there is no such sign."""
    nodes = sorted(DEVICES.glob("accel[0-9]*"))
    if nodes:
        return str(nodes[0])
    return "libtpu" if version("libtpu") else None


def _missed(what: str, sign: str, extras: Sequence[str], platforms: Sequence[str]) -> Item:
    """Return the problem item of an accelerator that JAX does not see.

    Args:
      what: the name of the accelerator.
      sign: what suggests that the machine has it.
      extras: the extras that make JAX see it, the best one first.
      platforms: its names in JAX_PLATFORMS.
    """
    problem = f"JAX does not see {what}, but {sign} suggests that there is one"
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen and not set(platforms) & set(chosen.split(",")):
        return {"problem": f"{problem}: JAX_PLATFORMS={chosen} leaves it out", "do": "unset JAX_PLATFORMS"}
    for extra in extras:
        plugin = ACCELERATORS[extra]
        if (found := version(plugin)) is None:
            continue
        if extra != "tpu" and found != version("jaxlib"):
            problem = f"{problem}: {plugin} {found} does not fit jaxlib {version('jaxlib')}"
            return {"problem": problem, "do": install_line(extra)}
        do = f"to see JAX's own error, run JAX_PLATFORMS={platforms[0]} gpt2-doctor"
        return {"problem": f"{problem}, although {plugin} {found} is installed", "do": do}
    return {"problem": problem, "do": f"{install_line(extras[0])} (the extra {extras[0]})"}


def _driver() -> int | None:
    """Return the major version of NVIDIA's driver; None if it is not known."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+)\.\d+", NVIDIA_VERSION.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None
