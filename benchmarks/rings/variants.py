"""Other builds of the client service's extension modules, each in a folder of its own, and running a program on one.

`address` has AddressSanitizer, `alter` moreover alters every shared entry right after its single fetch
(client_fetch.h), `coverage` counts branches for gcov, by the lines of the Cython source. Only what the harness needs is
built: the whole service, the rings, the fuzzing client; no engine.
"""

import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ROOT / "pyx" / "kdaemon_pyx"
FLAGS = {
    "address": ["-O1", "-fsanitize=address", "-fno-omit-frame-pointer"],
    "alter": ["-O1", "-fsanitize=address", "-fno-omit-frame-pointer", "-DKDAEMON_CLIENT_ALTER_FETCHED"],
    "coverage": ["-O0", "--coverage"],
}
_CIMPORT = re.compile(r"^from kdaemon_pyx\.(\w+) c?import", re.MULTILINE)
_DIRECTIVES = ["boundscheck=False", "wraparound=False", "cdivision=True", "initializedcheck=False"]


def modules(first: str = "client_harness") -> list[str]:
    """The module and all that it imports, those that are only declarations left out."""
    found, waiting = set(), [first]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            files = [SOURCES / f"{name}{suffix}" for suffix in (".pyx", ".pxd")]
            waiting += [match for file in files if file.exists() for match in _CIMPORT.findall(file.read_text())]
    return sorted(name for name in found if (SOURCES / f"{name}.pyx").exists())


def build(variant: str, folder: Path) -> None:
    """Compiles what has changed since the last time; `folder` is then for `PYTHONPATH`."""
    package = folder / "kdaemon_pyx"
    package.mkdir(parents=True, exist_ok=True)
    for source in SOURCES.iterdir():
        if source.suffix in (".pyx", ".pxd", ".py", ".h"):
            copy = package / source.name
            if not copy.exists() or copy.read_bytes() != source.read_bytes():
                copy.write_bytes(source.read_bytes())
    newest_declaration = max(file.stat().st_mtime for pattern in ("*.pxd", "*.h") for file in package.glob(pattern))

    def compile_one(name: str) -> None:
        source, module = package / f"{name}.pyx", package / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if module.exists() and module.stat().st_mtime > max(newest_declaration, source.stat().st_mtime):
            return
        directives = [word for directive in _DIRECTIVES for word in ("-X", directive)]
        cython = [sys.executable, "-m", "cython", "-3", "--line-directives", *directives, f"kdaemon_pyx/{name}.pyx"]
        subprocess.run(cython, cwd=folder, check=True)
        if variant == "coverage":
            _repeat_line_directives(package / f"{name}.c")
        flags = ["-std=gnu11", "-g", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", *FLAGS[variant]]
        include = ["-Ikdaemon_pyx", f"-I{sysconfig.get_path('include')}"]
        command = ["gcc", *flags, *include, f"kdaemon_pyx/{name}.c", "-o", str(module)]
        subprocess.run(command, cwd=folder, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, modules()))


def _repeat_line_directives(source: Path) -> None:
    """A statement of Cython's becomes several lines of C: all of them count for its line."""
    lines, directive = [], ""
    for line in source.read_text().split("\n"):
        if line.startswith("#line "):
            directive = line if ".pyx" in line else ""
        elif directive and not (lines and lines[-1].endswith("\\")):
            lines.append(directive)
        lines.append(line)
    source.write_text("\n".join(lines))


def run(variant: str, folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` on that build; raises CalledProcessError, the sanitizer's report on standard error."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",  # leaks are counted: Python's own are many
    }
    if variant != "coverage":
        library = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment["LD_PRELOAD"] = str(Path(library.stdout.strip()).resolve())
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, text=True, stdout=subprocess.PIPE)
