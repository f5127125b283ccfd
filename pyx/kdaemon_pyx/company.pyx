"""Whether a wait of the engine is held for company: a wake-up costs the same for one message as for many, and a fast engine is woken for each.

Held as long as that brings more than one receive, or much in one; now and then a wait is held to find out. A peer that asks and waits for the answer
is not delayed so, but for the trials. Streams are waited for longer.
"""

from libc.stdint cimport uint32_t

from kdaemon_pyx.core cimport Core

cdef enum:
    HOLD_MISSES = 4                # held waits in vain that end it
    HOLD_TRIAL = 128               # other waits until it is tried again
    BULK_TURNS = 8                 # so many in a row that received in bulk are a stream, and not a large message whose sender waits
    BULK_HOLD_US = 300             # a stream waits for nobody; its program and the engine are woken less


cdef uint32_t company_wait_us(Core* core) noexcept nogil:
    """How long the next wait is held, in microseconds; 0: not."""
    core.bulk_turns = core.bulk_turns + 1 if core.bulk_pieces else 0
    if core.held:
        core.held = 0
        core.hold_misses = 0 if core.company > 1 else core.hold_misses + 1
        core.holding = core.hold_misses < HOLD_MISSES
        core.hold_waits = 0
    core.company = 0
    if core.hold_us == 0:
        return 0
    core.hold_waits += 1
    if not core.holding and core.hold_waits < HOLD_TRIAL:
        return 0
    core.held = 1
    core.counters.held_waits += 1
    if not core.holding:
        core.hold_misses = HOLD_MISSES - 1         # one more is enough to stop again
    return BULK_HOLD_US if core.bulk_turns >= BULK_TURNS else core.hold_us
