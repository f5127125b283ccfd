"""What benchmarks/handshake measures: engines in memory, and servers and clients over sockets."""
