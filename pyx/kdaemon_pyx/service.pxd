"""What the engine takes as a service."""

from kdaemon_pyx.core cimport Service


# Base of the objects passed to Engine(services=...). The subclass fills `table`, which the engine uses as long as run() lasts;
# the Engine object keeps the service object alive.
cdef class ServiceObject:
    cdef Service table
