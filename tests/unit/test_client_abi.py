"""docs/client-ring.md against client_abi.h: every structure, field, offset and number, as the C compiler has them."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi

ROOT = Path(__file__).resolve().parent.parent.parent
HEADER = ROOT / "pyx" / "kdaemon_pyx" / "client_abi.h"
DOCUMENT = (ROOT / "docs" / "client-ring.md").read_text()

_STRUCT = re.compile(r"^struct (\w+) \{(.*?)^\};", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^\s+(?:struct )?(_Atomic )?(\w+) (\w+)(?:\[(\d+)\])?;", re.MULTILINE)
_ROW = re.compile(r"^\| (\d+) \| `([^`]+)` \| `(\w+)` \|", re.MULTILINE)
_HEADING = re.compile(r"^#+ `struct (\w+)`, (\d+) bytes", re.MULTILINE)


def declared() -> dict[str, list[tuple[str, str]]]:
    """Structures of the header: their fields, each with its type."""
    found = {}
    for name, body in _STRUCT.findall(HEADER.read_text()):
        fields = [(field, kind + (f"[{count}]" if count else "")) for _, kind, field, count in _FIELD.findall(body)]
        found[name] = [(field, kind) for field, kind in fields if field != "padding"]
    return found


@cache
def compiled() -> dict[str, int]:
    """sizeof and offsetof by the compiler: `struct` and `struct.field`."""
    lines = ["#include <stdio.h>", '#include "client_abi.h"', "int main(void) {"]
    for struct, fields in declared().items():
        lines.append(f'printf("{struct} %zu\\n", sizeof(struct {struct}));')
        lines += [f'printf("{struct}.{f} %zu\\n", offsetof(struct {struct}, {f}));' for f, _ in fields]
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/offsets"
        command = ["gcc", "-std=c11", "-Wall", "-Werror", f"-I{HEADER.parent}", "-x", "c", "-", "-o", program]
        subprocess.run(command, input="\n".join([*lines, "return 0; }"]), text=True, check=True)
        output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in (line.split() for line in output.splitlines())}


def documented() -> dict[str, tuple[int, list[tuple[int, str, str]]]]:
    """Structures of the document: size, and the rows (offset, type, field) of the table under each heading."""
    found = {}
    headings = list(_HEADING.finditer(DOCUMENT))
    for heading, following in itertools.zip_longest(headings, headings[1:]):
        section = DOCUMENT[heading.end() : following.start() if following else None].split("\n#")[0]
        rows = [(int(offset), kind, field) for offset, kind, field in _ROW.findall(section)]
        found[heading.group(1)] = int(heading.group(2)), rows
    return found


def test_every_structure_is_documented() -> None:
    assert set(documented()) == set(declared()) - {"client_line"}


@pytest.mark.parametrize("struct", sorted(set(declared()) - {"client_line"}))
def test_structure(struct: str) -> None:
    size, rows = documented()[struct]
    assert size == compiled()[struct]
    expected = [(compiled()[f"{struct}.{field}"], kind, field) for field, kind in declared()[struct]]
    assert rows == expected


def test_offsets_in_the_headers_comments() -> None:
    """Each field's comment begins with its offset."""
    for struct, body in _STRUCT.findall(HEADER.read_text()):
        for field, offset in re.findall(r"(\w+)(?:\[\d+\])?;\s*/\*\s*(\d+)[: ]", body):
            assert int(offset) == compiled()[f"{struct}.{field}"], f"{struct}.{field}"


def enumerated() -> dict[int, str]:
    text = HEADER.read_text()
    body = text[text.index("enum client_opcode") :].partition("}")[0]
    return {int(number): name for name, number in re.findall(r"CLIENT_(\w+) = (\d+)", body) if name != "OPCODE_COUNT"}


def test_opcodes() -> None:
    """The document's table, the header, and the names that errors give."""
    table = {int(number): name for number, name in re.findall(r"^\| (\d+) ([A-Z_]+) \|", DOCUMENT, re.MULTILINE)}
    assert table == enumerated()
    assert dict(enumerate(client_abi.OPCODE_NAMES)) == enumerated()


def test_constants() -> None:
    """Every constant a client needs is in the document with its number."""
    defined = re.findall(r"^#define (CLIENT_[A-Z_0-9]+) \(?([0-9a-fx]+)u?(?: << (\d+)\))?", HEADER.read_text(), re.M)
    assert len(defined) > 20
    rows = dict(re.findall(r"^\| `(CLIENT_\w+)` \| ([0-9a-fx]+) \|", DOCUMENT, re.MULTILINE))
    for name, value, shift in defined:
        assert name in rows, f"{name} is not documented"
        assert int(rows[name], 0) == int(value, 0) << int(shift or 0), name
