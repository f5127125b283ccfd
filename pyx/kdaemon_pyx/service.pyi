"""Types of the services that an engine takes."""

class ServiceObject:
    """A table of functions for the engine (connection.pxd, Service); only its subclasses are of use."""
