"""The engine thread: the loop over completions, commands, timers."""

from libc.stdint cimport uint32_t

from kdaemon_pyx.core cimport Core

cdef enum:
    COMMAND_LISTEN = 1
    COMMAND_UNLISTEN = 2
    COMMAND_RECEIVE = 3
    COMMAND_SEND = 4
    COMMAND_INSTALL = 5
    COMMAND_REKEY = 6
    COMMAND_SEND_CONTROL = 7
    COMMAND_CLOSE = 8
    COMMAND_DRAIN = 9
    COMMAND_STOP = 10
    COMMAND_ADOPT = 11
    COMMAND_PLAIN = 12
    COMMAND_START_TLS = 13
    COMMAND_EXPORT = 14


cdef int loop_setup(Core* core) noexcept nogil
cdef int loop_run(Core* core) noexcept nogil
cdef void loop_teardown(Core* core) noexcept nogil
