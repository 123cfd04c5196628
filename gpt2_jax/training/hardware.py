"""The peak speed of devices, and the share of it that a run uses: the MFU."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Protocol

from gpt2_jax.config import GPT2Config

# Operations per second of dense bfloat16 matrix products, accumulated in float32. A multiply-add counts as two.
# NVIDIA's data sheets highlight twice this number, "with sparsity". These are the dense numbers.
PEAKS = {
    # "HGX B200/B300" and "GB200/GB300 NVL72" data sheets, per GPU.
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    # "H100", "H200" and "GH200 Superchip" data sheets: half of the sparse numbers 1,979, 1,513 and 1,671.
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835.5e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H800": 989e12,
    # "A100", "A800", "A40", "A30", "A10" and "RTX A6000" data sheets; Amazon's A10G has about half of an A10's.
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "A10G": 70e12,
    "RTX A6000": 154.8e12,
    # "L40S", "L40", "L4" and "RTX 6000 Ada Generation" data sheets.
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada Generation": 364.2e12,
    # "V100" and "T4" data sheets. They have no bfloat16 (XLA computes it in float32): these are float16 numbers.
    "V100-SXM2": 125e12,
    "V100-SXM3": 125e12,
    "V100-PCIE": 112e12,
    "V100S-PCIE": 130e12,
    "T4": 65e12,
    # GeForce: the whitepapers "RTX Blackwell", "Ada GPU Architecture" and "Ampere GA102", appendices.
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 4080": 97.5e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
    # Google's page for each TPU gives the number of a chip. For v2, v3 and 7x, a JAX device is one of two cores.
    "TPU7x": 2307e12 / 2,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12 / 2,
    "TPU v2": 45e12 / 2,
}
"""{device: operations per second}"""
# Text that may surround these names in `device_kind`: maker, memory, form factor. Suffixes of other devices do not
# match: "Ti", "Laptop GPU", or a slice of a GPU ("MIG 1g.10gb").
KIND = re.compile(r"(NVIDIA |Tesla |GeForce )*({})(-(SXM\d|PCIE|SXM))?([- ]\d+GB)?( HBM\w+| PCIe)?")


class Device(Protocol):
    """The part of `jax.Device` that is used here."""

    @property
    def platform(self) -> str:
        """The kind of device: "cpu", "gpu" or "tpu"."""
        ...

    @property
    def device_kind(self) -> str:
        """The maker's name for the device."""
        ...


def peak_flops(device: Device) -> float | None:
    """Return the peak operations per second of a device, in dense bfloat16; None if that is not known.

    The bfloat16 peak is also used for runs in float32. So these runs have a smaller MFU.
    """
    return None if device.platform == "cpu" else _peak_of_kind(device.device_kind)


@functools.cache  # called at every step
def _peak_of_kind(device_kind: str) -> float | None:
    names = "|".join(map(re.escape, sorted(PEAKS, key=len, reverse=True)))
    found = re.fullmatch(KIND.pattern.replace("{}", names), device_kind)
    return None if found is None else PEAKS[found[2]]


def flops_per_token(config: GPT2Config, n_tokens: int) -> float:
    """Return the operations that training takes per token in windows of n_tokens: 6 N + 12 L D T.

    N is the number of all parameters, including the embeddings. L layers of width D attend over T tokens. This is the
    count of PaLM (Chowdhery et al. 2022, appendix B). Attention counts in full, including the half that the causal mask
    leaves out. Recomputation by `remat` does not count.
    """
    return 6.0 * config.n_params + 12.0 * config.n_layer * config.n_embd * n_tokens


def mfu(tokens_per_second: float, config: GPT2Config, n_tokens: int, devices: Sequence[Device]) -> float | None:
    """Return the share of the devices' peak that a run uses: "model FLOPs utilization", 0 to 1.

    Args:
      tokens_per_second: the speed of all devices together.
      config: the model's config.
      n_tokens: tokens of a window.
      devices: the devices of the run.

    Returns:
      The share; None if there are no devices, or if the peak of one is not known.
    """
    peaks = [peak_flops(device) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if not known or len(known) < len(peaks):
        return None
    return tokens_per_second * flops_per_token(config, n_tokens) / sum(known)
