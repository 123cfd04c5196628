"""What `gpt2-doctor` prints without --verify: a table for each part of the report, and the problems at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpt2_jax.commands._tables import binary_size, plain_table

if TYPE_CHECKING:
    from rich.console import Console

Parts = list[tuple[str, Any]]
"""Pairs of a title and the table below it."""


def print_report(found: dict[str, Any], console: Console) -> None:
    """Print the result of `doctor.examine`."""
    parts = (
        ("Packages", _packages(found)),
        ("Machine", _machine(found)),
        ("Devices", _devices(found)),
        ("Cache folder", _cache(found)),
        ("Released sizes", _releases(found)),
        ("Optional packages", _optional(found)),
    )
    for title, table in parts:
        console.print(title, style="bold")
        console.print(table, "", sep="\n")
    if not found["problems"]:
        console.print("No problems found.")
    for number, one in enumerate(found["problems"], start=1):
        console.print(f"Problem {number}: {one['problem']}", style="bold", soft_wrap=True)
        console.print(f"  What to do: {one['do']}", soft_wrap=True)


def _packages(found: dict[str, Any]) -> Any:
    table = plain_table("package", "version", "needs", "state")
    for item in found["packages"]:
        cells = (item.get("name", ""), item.get("version") or "absent", item.get("needs", ""))
        table.add_row(*cells, _state(item))
    return table


def _machine(found: dict[str, Any]) -> Any:
    machine = found["machine"]
    table = plain_table("", "")
    table.show_header = False
    table.add_row("operating system", machine["os"])
    table.add_row("machine", machine["machine"])
    table.add_row("processors", f"{machine['processors']}; this process may use {machine['usable_processors']}")
    table.add_row("memory", f"{_size(machine['memory_bytes'])}; {_size(machine['available_bytes'])} are available")
    for name, value in machine["environment"].items():
        table.add_row(name, value)
    return table


def _devices(found: dict[str, Any]) -> Any:
    jax = found["jax"]
    table = plain_table(">id", "backend", "kind", ">memory", ">in use", "state")
    for device in jax["devices"]:
        memory = device["memory_bytes"]
        if memory is None and device["platform"] == "cpu":
            memory = found["machine"]["memory_bytes"]
        used = "" if device["used_bytes"] is None else _size(device["used_bytes"])
        default = "JAX's default" if device is jax["devices"][0] else "ok"
        table.add_row(str(device["id"]), device["platform"], device["kind"], _size(memory), used, default)
    for item in jax["items"]:
        table.add_row("", "", "", "", "", _state(item))
    return table


def _cache(found: dict[str, Any]) -> Any:
    cache = found["cache"]
    table = plain_table("", "")
    table.show_header = False
    if cache["path"] is None:
        table.add_row("folder", _state(cache))
        return table
    exists = "" if cache["exists"] else ", not created yet"
    table.add_row("folder", f"{cache['path']}{exists}")
    table.add_row("writable", "yes" if cache["writable"] else _state(cache))
    table.add_row("size", _size(cache["bytes"]))
    table.add_row("free on its disk", _size(cache["free_bytes"]))
    table.add_row("kept copies of checkpoints", _many(cache["copies"]))
    compiled = cache["compiled"]
    limit = f", at most {_size(compiled['limit_bytes'])}" if compiled["limit_bytes"] else ""
    off = "" if compiled["on"] else "; turned off by JAX_ENABLE_COMPILATION_CACHE"
    table.add_row("compiled programs", f"{_many(compiled)}{limit}, in {compiled['path']}{off}")
    return table


def _releases(found: dict[str, Any]) -> Any:
    table = plain_table("model", ">weights", "state", ">here", ">kept copy", "what to do")
    for item in found["releases"]:
        if "size" not in item:
            table.add_row("", "", _state(item), "", "", item["do"])
            continue
        state = item["state"].upper() if item["problem"] else item["state"]
        copy = _size(item["copy_bytes"]) if item["copy_bytes"] else ""
        sizes = (_size(item["weights_bytes"]), state, _size(item["bytes"]), copy)
        table.add_row(item["size"], *sizes, item["do"] or "")
    for item in found["embedded_model"]:
        table.add_row("shakespeare", "", "part of the package" if not item["problem"] else _state(item), "", "", "")
    return table


def _optional(found: dict[str, Any]) -> Any:
    table = plain_table("extra", "installed", "absent", "to install")
    for item in found["optional"]:
        if "extra" not in item:
            table.add_row("", "", _state(item), item["do"])
            continue
        installed, absent = (", ".join(item[key]) or "none" for key in ("installed", "absent"))
        table.add_row(item["extra"], installed, absent, item["do"] or "")
    return table


def _state(item: dict[str, Any]) -> str:
    return f"PROBLEM: {item['problem']}" if item["problem"] else "ok"


def _many(files: dict[str, int]) -> str:
    return f"{files['number']}, {_size(files['bytes'])}"


def _size(n_bytes: int | None) -> str:
    """Return a size as 0 B, 12.3 KiB, 474.7 MiB or 1.85 GiB."""
    if n_bytes is None:
        return "unknown"
    if n_bytes >= 2**20:
        return binary_size(n_bytes)
    return f"{n_bytes / 2**10:.1f} KiB" if n_bytes >= 2**10 else f"{n_bytes} B"
