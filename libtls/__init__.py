"""Client library of kdaemon: TLS for any program through shared rings (docs/client-ring.md)."""
