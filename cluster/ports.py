"""Hosts and ports of this machine: whether one can be listened on, one that nobody listens on, and which other machines do not reach."""

from __future__ import annotations

import errno
import ipaddress
import socket

from cluster.errors import CappyError, UsageError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""What this machine is called by itself."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int, settings: str) -> None:
    """See that a server could listen there; `settings` is what the names of the two settings begin with, e.g. `serving.`.

    Raises `CappyError` where the port is taken, `UsageError` where the host is not one of this machine's or the port needs root.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As servers do: connections of an earlier one that are still closing do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise UsageError(f"{settings}host={host} is no address; use 127.0.0.1, or an address of this machine") from None
    except PermissionError:
        raise UsageError(f"{settings}port={port} needs root; set {settings}port above 1023") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CappyError(f"{settings}port={port} is in use on {host}; stop the other server or set {settings}port") from None
        raise UsageError(f"{settings}host={host} cannot be bound: {error.strerror}; use an address of this machine") from None


def free_port(host: str = "127.0.0.1", beyond: int = 0) -> int:
    """Return a port nothing listens on at `host`; with `beyond`, the ports up to that far above it are free too."""
    while True:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port: int = probe.getsockname()[1]
        if all(_is_free(host, port + step) for step in range(beyond + 1)):
            return port


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return port < 65536 and probe.connect_ex((host, port)) != 0
