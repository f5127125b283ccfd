"""The repository's own rules, checked: directions of imports, sizes, and what must not be in a file."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LINES_MAX = 500
# Files that may be longer, each with the reason why splitting it would make it worse.
LONGER: dict[str, tuple[int, str]] = {}

SOURCE_SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".h", ".c", ".sh"}
PACKAGES = ("kdaemon", "libtls", "pyx", "tests", "benchmarks", "scripts")


def is_script(path: Path) -> bool:
    """A program without a suffix: it begins with #!."""
    if path.suffix:
        return False
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def sources() -> list[Path]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            if path.suffix == ".c" and path.with_suffix(".pyx").exists():
                continue  # Cython's output
            if path.suffix in SOURCE_SUFFIXES or is_script(path):
                found.append(path)
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def each(*suffixes: str, under: str = "") -> list[object]:
    return [
        pytest.param(path, id=name(path))
        for path in sources()
        if (path.suffix in suffixes or (not suffixes)) and name(path).startswith(under)
    ]


def imports_of_python(source: str, package: str) -> set[str]:
    """Absolute names of all that `source`, a module in `package`, imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


_CYTHON_FROM = re.compile(r"^\s*from\s+([\w.]+)\s+c?import\b", re.MULTILINE)
_CYTHON_IMPORT = re.compile(r"^\s*c?import\s+([\w., ]+)", re.MULTILINE)


def imports_of_cython(source: str) -> set[str]:
    """What `source` imports or cimports; relative names are left with their leading dot."""
    found = set(_CYTHON_FROM.findall(source))
    for names in _CYTHON_IMPORT.findall(source):
        found.update(part.split()[0] for part in names.split(",") if part.strip())
    return found


def is_under(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def forbidden(path: Path, source: str) -> set[str]:
    """The imports of `path` that point the wrong way: kdaemon/tls is sans-I/O, pyx and libtls stand apart."""
    where = path.relative_to(ROOT)
    if where.parts[0] == "pyx":
        imports = imports_of_cython(source)
        return {module for module in imports if is_under(module, "kdaemon", "libtls")}
    imports = imports_of_python(source, ".".join(where.parts[:-1]))
    if where.parts[:2] == ("kdaemon", "tls"):
        allowed = {*sys.stdlib_module_names, "cryptography"}
        sockets_and_clocks = {"socket", "select", "selectors", "asyncio", "time", "_socket"}
        return {
            module
            for module in imports
            if not is_under(module, "kdaemon.tls")
            and (module.split(".")[0] not in allowed or module.split(".")[0] in sockets_and_clocks)
            and module != "kdaemon"
        }
    if where.parts[0] == "libtls":
        rings = ("kdaemon_pyx.client_ring", "kdaemon_pyx.client_stream", "kdaemon_pyx.client_abi")
        return {
            module
            for module in imports
            if is_under(module, "kdaemon")
            or (is_under(module, "kdaemon_pyx") and module != "kdaemon_pyx" and not is_under(module, *rings))
        }
    if where.parts[0] == "kdaemon":
        return {module for module in imports if is_under(module, "libtls")}
    return set()


LAYERED = [
    param for package in ("kdaemon", "libtls", "pyx") for param in each(".py", ".pyi", ".pyx", ".pxd", under=package)
]


@pytest.mark.parametrize("path", LAYERED)
def test_imports_point_downwards(path: Path) -> None:
    assert not forbidden(path, path.read_text())


@pytest.mark.parametrize(
    ("where", "source", "wrong"),
    [
        ("kdaemon/tls/x.py", "import socket", {"socket"}),
        ("kdaemon/tls/x.py", "def f():\n    from time import time", {"time", "time.time"}),
        ("kdaemon/tls/x.py", "from kdaemon.config import load", {"kdaemon.config", "kdaemon.config.load"}),
        ("kdaemon/tls/x.py", "from ..config import load", {"kdaemon.config", "kdaemon.config.load"}),
        ("kdaemon/tls/x.py", "from .alerts import Alert\nimport hashlib\nfrom cryptography import x509", set()),
        ("kdaemon/worker.py", "from libtls import attach", {"libtls", "libtls.attach"}),
        ("libtls/x.py", "import kdaemon.tls", {"kdaemon.tls"}),
        ("libtls/x.py", "from kdaemon_pyx import engine", {"kdaemon_pyx.engine"}),
        ("libtls/x.py", "from kdaemon_pyx.client_ring import ClientRing", set()),
        ("pyx/kdaemon_pyx/x.pyx", "from kdaemon.tls cimport y", {"kdaemon.tls"}),
        ("pyx/kdaemon_pyx/x.pxd", "cimport libtls\nfrom libc.stdint cimport uint8_t", {"libtls"}),
        ("pyx/kdaemon_pyx/x.pyx", "    import os, kdaemon.config as c", {"kdaemon.config"}),
    ],
)
def test_the_import_check_sees(where: str, source: str, wrong: set[str]) -> None:
    """The check itself: each wrong direction is found, and the right ones are left alone."""
    assert forbidden(ROOT / where, source) == wrong


@pytest.mark.parametrize("path", each())
def test_size(path: Path) -> None:
    allowed, _reason = LONGER.get(name(path), (LINES_MAX, ""))
    lines = len(path.read_text().splitlines())
    assert lines <= allowed, f"{lines} lines: split it by purpose"


def test_exceptions_are_needed() -> None:
    """Every exception names an existing file that is still too long for the rule, and says why."""
    for file, (allowed, reason) in LONGER.items():
        assert allowed > LINES_MAX and len((ROOT / file).read_text().splitlines()) > LINES_MAX and reason, file


# Written in pieces so that this file passes its own checks.
LEFT_OVER = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|Users|work|root)" r"/[\w.-]+|(?<![\w.])/(tmp/w|opt/\w*venv)\b")


@pytest.mark.parametrize("path", each())
def test_nothing_is_left_for_later(path: Path) -> None:
    assert not LEFT_OVER.search(path.read_text())


@pytest.mark.parametrize("path", each())
def test_no_path_of_one_machine(path: Path) -> None:
    found = [match.group() for match in MACHINE_PATH.finditer(path.read_text())]
    assert not found, found


def sleeps(source: str) -> list[int]:
    """Lines that call something named sleep; asyncio.sleep(0) only lets the other tasks run, and waits for no time."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and "sleep" in (getattr(node.func, "attr", None), getattr(node.func, "id", None))
        and not (node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0)
    ]


@pytest.mark.parametrize("path", each(".py", under="tests/"))
def test_tests_wait_for_events_not_for_time(path: Path) -> None:
    assert not sleeps(path.read_text())


def test_the_sleep_check_sees() -> None:
    assert sleeps("import time\ntime.sleep(1)\nasyncio.sleep(0)\nsleep(0.1)\nasyncio.sleep(n)") == [2, 4, 5]


@pytest.mark.parametrize("path", each(".py", ".pyx", ".pyi"))
def test_modules_say_what_they_are_for(path: Path) -> None:
    """Every module has a docstring; a Cython module may have it as the comment that begins its .pxd."""
    source = path.read_text()
    if not source.strip():
        return
    if path.suffix == ".pyx":
        declarations = path.with_suffix(".pxd")
        without_directives = "\n".join(
            line for line in source.splitlines() if not line.startswith("# cython:")
        ).lstrip()
        documented = without_directives.startswith(('"""', "#")) or (
            declarations.exists() and declarations.read_text().lstrip().startswith(('"""', "#"))
        )
        assert documented
    else:
        assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("file", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "Dockerfile", ".ci/run"])
def test_the_repository_has(file: str) -> None:
    assert (ROOT / file).stat().st_size > 0
