"""zygote: a single-threaded process with everything imported, which forks the workers and their replacements.

`python -m kdaemon.zygote`, started by the supervisor with descriptor 3. A worker must be a child of the supervisor,
not of the zygote: then its exit status arrives there, and the zygote's death means nothing to it. So each worker is
forked twice; the process in between exits at once and the worker falls to the supervisor, which is a subreaper. A
worker begins only when its pid has been reported, so none can exist that the supervisor does not know.
"""

import gc
import os
import sys

from kdaemon import process
from kdaemon.channel import Channel
from kdaemon.config import from_mapping
from kdaemon.observe import configure_logging


def main() -> int:
    """Entry point of the process; returns its exit status."""
    process.ignore_terminal_signals()
    process.set_name("kdaemon-zygote")
    process.sacrifice(process.SACRIFICE_WORKER)
    supervisor = Channel.from_fd(3)
    try:
        message, _ = supervisor.receive()
    except EOFError:
        return 0
    config = from_mapping(message["config"])
    configure_logging(config.log, "zygote")
    try:
        # Before the change of user: the account need not be able to read the interpreter's files
        from kdaemon import worker  # noqa: PLC0415 - only now is there someone to tell what is missing

        process.change_user(config.users.worker)
    except (LookupError, OSError, ImportError) as error:
        supervisor.send({"type": "failed", "reason": f"workers cannot be prepared: {error}"})
        return 1
    process.harden()
    process.die_with_parent(message["supervisor"], 9)
    gc.collect()
    gc.freeze()  # what is imported stays in pages that all workers share
    supervisor.send({"type": "ready"})
    while True:
        try:
            request, fds = supervisor.receive()
        except EOFError:
            return 0
        if request["type"] == "ping":
            supervisor.send({"type": "pong"})
            continue
        index = request["index"]
        begin, begun = os.pipe2(os.O_CLOEXEC)
        pid_reader, pid_writer = os.pipe2(os.O_CLOEXEC)
        between = os.fork()
        if between == 0:
            if os.fork() == 0:
                supervisor.close()
                os.close(begun)
                os.close(pid_reader)
                try:
                    os.write(pid_writer, str(os.getpid()).encode())
                except BrokenPipeError:
                    os._exit(0)  # the zygote is dead, and nobody knows of this one
                os.close(pid_writer)
                # The word to begin; end of file: the zygote died before it could report this worker
                status = worker.main(Channel.from_fd(fds[0]), index, message["supervisor"]) if os.read(begin, 1) else 0
                os._exit(status)
            os._exit(0)
        os.close(begin)
        os.close(pid_writer)
        os.waitpid(between, 0)  # from here on the worker is the supervisor's child
        pid = int(os.read(pid_reader, 16))
        os.close(pid_reader)
        os.close(fds[0])
        try:
            supervisor.send({"type": "forked", "index": index, "pid": pid})
        except OSError:
            return 0  # no supervisor: the worker reads end of file and leaves too
        os.write(begun, b"b")
        os.close(begun)


if __name__ == "__main__":
    sys.exit(main())
