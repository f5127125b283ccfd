"""A page, through the daemon: python fetch.py HOST PORT [CAFILE]."""

import sys

import libtls

host, port, *cafile = sys.argv[1:]

libtls.tls_init()
with libtls.tls_wait(libtls.tls_open(host, int(port), cafile=cafile[0] if cafile else None)) as page:
    page.write(b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host.encode())
    print(page.makefile().read().decode())
