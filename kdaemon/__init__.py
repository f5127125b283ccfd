"""kdaemon: TLS as a Linux system service. See ARCHITECTURE.md for the picture."""

__version__ = "0.1.0"
