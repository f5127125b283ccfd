"""The client service in one process, without sockets or TLS: for tests, fuzzing and measuring the rings alone."""

from kdaemon_pyx.client_admission import Clients

class Harness:
    """Runs the daemon's side of the rings over connections that echo into themselves."""

    clients: Clients
    def __init__(self, *, clients_max: int = 64, spin_ns: int = 20000) -> None: ...
    def run(self) -> None:
        """The daemon's loop, without the GIL, until stop(). One thread."""
    def stop(self) -> None: ...
    def connections(self) -> int:
        """Connections that exist, of all harnesses of this process."""
    def turn(self) -> int:
        """One turn in the calling thread (not while run() runs)."""
    def fuzz(self, entries: int, seed: int, *, rewrite: bool = False) -> dict[str, object]:
        """Mutated submissions through a client of its own, in the calling thread (not while run() runs).

        rewrite: another thread alters submissions, parameters and indices meanwhile. Raises AssertionError when an
        invariant breaks. Returns counts: entries, accepted (and run: not answered EINVAL, EBUSY, EBADF, EMFILE), rejected (at validation), cut_off,
        clients, results by errno, succeeded by opcode.
        """
def fetch_alters() -> bool:
    """Whether this build alters each shared entry right after its single fetch (KDAEMON_CLIENT_ALTER_FETCHED)."""
