"""The fuzzing client against the client service, beside an honest one.

    python -m benchmarks.rings.fuzz ENTRIES [SEED] [--rewrite] [--build address|alter]

--build address has AddressSanitizer watch; --build alter moreover alters every shared entry right after its single
fetch, which a second fetch would not survive. Such a build goes to a folder of its own (--folder) and takes a minute
the first time. Every million entries is a run of its own with the next seed; the heap may not grow from run to run.
"""

import argparse
import collections
import ctypes
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kdaemon_pyx.client_harness import Harness, fetch_alters

from benchmarks.rings import variants

RUN_ENTRIES = 1_000_000
HEAP_GROWTH_MAX = 1 << 14  # bytes, over all runs but the first


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def heap_bytes() -> int:
    """What malloc has given out: the sanitizer's count where it is, the C library's otherwise."""
    gc.collect()
    library = ctypes.CDLL(None)
    try:
        function = library.__sanitizer_get_current_allocated_bytes
    except AttributeError:
        library.mallinfo2.restype = _Mallinfo2
        info = library.mallinfo2()
        return int(info.uordblks + info.hblkhd)
    function.restype = ctypes.c_size_t
    return int(function())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=1)
    parser.add_argument("--rewrite", action="store_true", help="another thread alters the shared memory meanwhile")
    parser.add_argument("--build", choices=["address", "alter"], help="run on this build instead of the installed one")
    parser.add_argument("--folder", type=Path, help="where that build is kept")
    arguments = parser.parse_args()
    if arguments.build:
        folder = arguments.folder or Path(tempfile.mkdtemp(prefix=f"kdaemon-{arguments.build}-"))
        variants.build(arguments.build, folder.resolve())
        again = ["-m", "benchmarks.rings.fuzz", str(arguments.entries), str(arguments.seed)]
        print(variants.run(arguments.build, folder.resolve(), [*again, *(["--rewrite"] * arguments.rewrite)]).stdout)
        return
    begin, cpu_begin = time.monotonic(), time.process_time()
    total: collections.Counter[str] = collections.Counter()
    results: collections.Counter[str] = collections.Counter()
    succeeded = [0] * 64
    harness, seed, heap = Harness(), arguments.seed, 0
    while total["entries"] < arguments.entries:
        wanted = min(RUN_ENTRIES, arguments.entries - total["entries"])
        report: dict[str, Any] = harness.fuzz(wanted, seed, rewrite=arguments.rewrite)
        total.update({name: report[name] for name in ("entries", "accepted", "rejected", "cut_off", "clients")})
        results.update(report["results"])
        succeeded = [a + b for a, b in zip(succeeded, report["succeeded"], strict=False)]
        seed += 1
        heap = heap or heap_bytes()
        if (grown := heap_bytes() - heap) > HEAP_GROWTH_MAX:
            sys.exit(f"seed {seed - 1}: the heap has grown by {grown} bytes since the first run: a leak")
        if total["entries"] // RUN_ENTRIES % 10 == 0:
            print(f"{total['entries']:,} entries, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                **total,
                "accepted_percent": round(100 * total["accepted"] / total["entries"], 1),
                "results": results,
                "succeeded": succeeded,
                "heap_growth": heap_bytes() - heap,
                "sanitizer": hasattr(ctypes.CDLL(None), "__asan_init"),
                "fetch_alters": fetch_alters(),
                "rewriter": arguments.rewrite,
                "seconds": round(time.monotonic() - begin, 1),
                "cpu_seconds": round(time.process_time() - cpu_begin, 1),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
