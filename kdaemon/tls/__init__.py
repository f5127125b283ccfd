"""Sans-I/O TLS 1.3 (RFC 8446, RFC 9846): no sockets, no clock, no threads; randomness and time are passed in."""
