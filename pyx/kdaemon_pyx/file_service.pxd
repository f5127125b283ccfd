# The file service: HTTP/1.1 sessions behind the Service table of the connection core.

from kdaemon_pyx.core cimport Service
from kdaemon_pyx.http_context cimport FileContext

cdef class FileService(FileContext):
    # For Core.services[0]; valid as long as this object, which the engine keeps a reference to until all connections are gone.
    cdef Service service
