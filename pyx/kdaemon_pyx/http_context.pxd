# Owner of what the HTTP sessions of one engine thread share.

from kdaemon_pyx.http_log cimport AccessLog
from kdaemon_pyx.http_session cimport HttpContext
from kdaemon_pyx.http_site cimport SiteTable
from kdaemon_pyx.mime cimport MimeTable

cdef class FileContext:
    cdef HttpContext context       # one engine thread at a time; everything in it is that thread's
    cdef SiteTable _sites
    cdef MimeTable _mime
    cdef AccessLog _log
