"""A short replay of the TLS fuzz targets: seeds with random changes, noise, what the fuzzers kept, what once failed."""

import random
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pair"))
import tls_targets

CORPUS = Path(__file__).resolve().parent / "tls_corpus"
ROUNDS = 300


def mutate(generator: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randint(1, 6)):
        position = generator.randrange(len(changed) + 1)
        action = generator.randrange(5)
        if action == 0 and changed:
            changed[position % len(changed)] = generator.randrange(256)
        elif action == 1 and changed:
            changed[position % len(changed)] ^= 1 << generator.randrange(8)
        elif action == 2:
            changed[position:position] = generator.randbytes(generator.randint(1, 8))
        elif action == 3:
            del changed[position : position + generator.randint(1, 20)]
        else:
            changed[position:position] = changed[: generator.randint(0, 60)]
    return bytes(changed)


@pytest.mark.parametrize("name", tls_targets.TARGETS)
def test_target(name):
    generator = random.Random(name)
    target = tls_targets.TARGETS[name]
    seeds = tls_targets.seeds(name)
    for seed in seeds:
        target(seed)
    for _ in range(ROUNDS):
        target(mutate(generator, generator.choice(seeds)))
        target(generator.randbytes(generator.randint(0, 200)))


@pytest.mark.parametrize("name", tls_targets.TARGETS)
def test_what_the_fuzzers_kept(name):
    target = tls_targets.TARGETS[name]
    with zipfile.ZipFile(CORPUS / f"{name}.zip") as kept:
        inputs = [kept.read(member) for member in kept.namelist()]
    assert inputs
    for data in inputs:
        target(data)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_corpus(path):
    tls_targets.TARGETS[path.parent.name](path.read_bytes())
