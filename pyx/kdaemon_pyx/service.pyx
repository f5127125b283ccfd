"""What the engine takes as a service: an object that owns a table of functions."""


cdef class ServiceObject:
    """Base of file_service.FileService and the like; by itself it is no service. Not thread-safe: made before run(), freed after it."""
