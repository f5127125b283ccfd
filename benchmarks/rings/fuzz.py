"""The fuzzing client against the client service: python -m benchmarks.rings.fuzz ENTRIES [SEED] [--rewrite].

Build with KDAEMON_SANITIZE=address (and run with libasan preloaded) to have AddressSanitizer watch; with
CFLAGS=-DKDAEMON_CLIENT_ALTER_FETCHED every shared entry is altered right after its single fetch.
"""

import argparse
import json
import time

from kdaemon_pyx.client_harness import Harness, fetch_alters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=1)
    parser.add_argument("--rewrite", action="store_true", help="another thread alters the shared memory meanwhile")
    arguments = parser.parse_args()
    begin = time.monotonic()
    report = Harness().fuzz(arguments.entries, arguments.seed, rewrite=arguments.rewrite)
    report["seconds"] = round(time.monotonic() - begin, 3)
    report["fetch_alters"] = fetch_alters()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
