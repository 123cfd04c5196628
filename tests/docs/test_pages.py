"""What people read works: the Python of README and the guides runs, commands parse, links and pictures are there."""

import os
import re
import shlex
import subprocess
import sys

import coming_from
import commands
import matplotlib.image
import pytest
import strength

ROOT = commands.ROOT
README = ROOT / "README.md"
FRONT = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md"]
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
PAGES = {str(path.relative_to(ROOT)): path for path in [*FRONT, *DOCS]}
INDENTED = re.compile(r"^    (.*(?:gpt2-|scripts/).*)$", re.MULTILINE)


def blocks(name: str, language: str) -> list[str]:
    text = PAGES[name].read_text(encoding="utf-8")
    return [body for tag, body in coming_from.FENCE.findall(text) if tag == language]


def shell_lines(name: str) -> list[str]:
    lines = "".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return [*lines, *INDENTED.findall(coming_from.FENCE.sub("", PAGES[name].read_text(encoding="utf-8")))]


def called(line: str) -> list[list[str]]:
    """Return the arguments of each command of this project in a line of shell, its name first."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    words, found, current = list(lexer), [], None
    for word in words:
        if re.fullmatch(r"[|&;<>()]+", word):
            current = None
        elif current is not None:
            current.append(word)
        elif name := re.fullmatch(r"(?:.*/)?(gpt2-[a-z-]+)|.*?(scripts/\w+\.py)", word):
            current = [name[1] or name[2]]
            found.append(current)
    return found


PYTHON = [name for name in PAGES if blocks(name, "python")]
BY_DEFAULT = {"README.md", "docs/index.md"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The environment in which the pages share their compiled programs."""
    shared = {"COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    shared |= {"PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return {f"JAX_{name}": value for name, value in shared.items()}


@pytest.mark.parametrize("name", strength.campaign([name for name in PYTHON if name in BY_DEFAULT], PYTHON))
def test_python_of_a_page_runs(name, compiled, tmp_path):
    """All of a page's blocks, in order, in one process, in a folder that has what a clone has."""
    for entry in ("models", "configs", "examples"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(blocks(name, "python"))],
        cwd=tmp_path,
        env=os.environ | compiled | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", [name for name in PAGES if any(map(called, shell_lines(name)))])
def test_commands_of_a_page_parse(name):
    """Each option exists and takes such a value."""
    found = [call for line in shell_lines(name) for call in called(line)]
    assert found
    for call in found:
        if "--help" not in call:
            commands.parse(*call)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_resolve(name):
    """Links to files and pages of the repository; those into the built pages Sphinx checks."""
    page = PAGES[name]
    text = coming_from.FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("name", [name for name in PAGES if "![" in PAGES[name].read_text(encoding="utf-8")])
def test_pictures_of_a_page_show_something(name):
    text = PAGES[name].read_text(encoding="utf-8")
    for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
        assert matplotlib.image.imread(PAGES[name].parent / target).std() > 0.01


def test_the_readme_is_a_front_door():
    assert len(README.read_text(encoding="utf-8").split()) <= 900
