"""What `gpt2-doctor` reports about packages: installed versions, required versions, and missing extras.

In a clone, the requirements are read from pyproject.toml. Otherwise they are read from the installed package's
metadata. No package is imported to find its version.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.requirements import Requirement

NAME = "gpt2-jax"
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"  # of a clone
ACCELERATORS = {"cuda13": "jax-cuda13-plugin", "cuda12": "jax-cuda12-plugin", "tpu": "libtpu"}
"""{extra for an accelerator: the package in it that makes JAX see the device}"""
_EXTRA = re.compile(r"""extra == ['"]([\w-]+)['"]""")

Item = dict[str, Any]
"""An entry of the report. Every item has problem: what is wrong, or None; and do: what to do about it, or None."""


def version(name: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def project() -> dict[str, Any]:
    """Return what gpt2-jax needs.

    Returns:
      version; python: the Python versions it runs on; needs: {"": requirements, "parity": those of this extra, ...}.
    """
    if PYPROJECT.is_file():
        table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        if table["name"] == NAME:
            needs = {"": table["dependencies"], **table["optional-dependencies"]}
            return {"version": table["version"], "python": table["requires-python"], "needs": needs}
    try:
        about = importlib.metadata.metadata(NAME)
    except importlib.metadata.PackageNotFoundError:
        return {"version": None, "python": "", "needs": {}}
    needs: dict[str, list[str]] = {}
    for line in importlib.metadata.requires(NAME) or []:
        extra = _EXTRA.search(line)
        needs.setdefault(extra[1] if extra else "", []).append(line)
    return {"version": about["Version"], "python": about["Requires-Python"], "needs": needs}


def installed() -> list[Item]:
    """Return name, version and required version of Python, gpt2_jax, jaxlib and each package that gpt2_jax needs."""
    about = project()
    python = platform.python_version()
    items = [
        _item("python", python, about["python"], _is_in(python, about["python"]), "install another version of Python"),
        _item("gpt2_jax", about["version"], "", True, ""),
    ]
    for need in _here(about["needs"].get("", []), ""):
        items.append(_package(need))
        if need.name == "jax":
            found = version("jaxlib")
            items.append(_item("jaxlib", found, "", found is not None, pip_install("jax")))
    return items


def optional() -> list[Item]:
    """Return which packages of each extra are installed. Extras for accelerators are left out.

    Returns:
      For each extra: extra; installed and absent: names of packages; problem: the packages whose version does not fit,
      or None (an absent package is not a problem); do: the command that installs the packages that are absent or do not
      fit, or None.
    """
    items = []
    for extra, lines in project()["needs"].items():
        if not extra or extra in ACCELERATORS:
            continue
        packages = [(need, _package(need)) for need in _here(lines, extra)]
        absent = [need for need, item in packages if item["version"] is None]
        wrong = [(need, item["problem"]) for need, item in packages if item["version"] and item["problem"]]
        wanted = [*absent, *(need for need, _ in wrong)]
        items.append(
            {
                "extra": extra,
                "installed": [item["name"] for _, item in packages if item["version"]],
                "absent": [need.name for need in absent],
                "problem": "; ".join(problem for _, problem in wrong) or None,
                "do": pip_install(*(f"{need.name}{need.specifier}" for need in wanted)) if wanted else None,
            }
        )
    return items


def install_line(extra: str) -> str:
    """Return the command that installs the packages of an extra for an accelerator."""
    lines = project()["needs"].get(extra) or [f"jax[{extra}]"]
    return pip_install(*(line.partition(";")[0].strip() for line in lines))


def _here(lines: list[str], extra: str) -> list[Requirement]:
    """Return the requirements that apply to this machine."""
    from packaging.requirements import Requirement

    needs = [Requirement(line) for line in lines]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]


def _package(need: Requirement) -> Item:
    found = version(need.name)
    if found is None and need.name == "tensorflow-cpu":  # the full TensorFlow package works too
        found = version("tensorflow")
    wanted = str(need.specifier)
    return _item(
        need.name, found, wanted, found is not None and _is_in(found, wanted), pip_install(f"{need.name}{wanted}")
    )


def _is_in(found: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(found, prereleases=True)


def _item(name: str, found: str | None, wanted: str, is_fine: bool, do: str) -> Item:
    problem = None if is_fine else f"{name} is absent" if found is None else f"{name} {found} is not {wanted}"
    return {"name": name, "version": found, "needs": wanted, "problem": problem, "do": None if is_fine else do}


def pip_install(*needs: str) -> str:
    """Return the command that installs these requirements."""
    return f"pip install {' '.join(shlex.quote(need) for need in needs)}"
