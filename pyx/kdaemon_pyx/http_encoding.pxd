# Content negotiation by Accept-Encoding (RFC 9110 section 12.5.3) between the encodings a file is there in.

from kdaemon_pyx.files cimport Encoding, Entry
from kdaemon_pyx.http_request cimport HttpRequest

# The representation to send: the one with the highest weight; among equals zstd, br, gzip, identity. Identity when nothing else fits.
cdef Encoding select_encoding(const HttpRequest* request, const Entry* entry) noexcept nogil
