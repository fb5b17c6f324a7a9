"""The network interface by which gloo reaches other nodes."""

from __future__ import annotations

import os
import socket

VARIABLE = "GLOO_SOCKET_IFNAME"


def name_interface(address: str) -> None:
    """Has this process's gloo, and that of processes that it starts, use the interface with `address`, which other nodes reach.

    By itself gloo takes the address that the machine's name has, which on many is 127.0.1.1.  Nothing is changed where the user
    has named an interface, or none has the address.
    """
    if VARIABLE not in os.environ and (name := interface_of(address)) is not None:
        os.environ[VARIABLE] = name


def interface_of(address: str) -> str | None:
    """Name of the interface with an IPv4 or IPv6 `address`, None if there is none."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    interfaces = psutil.net_if_addrs().items()
    found = (name for name, own in interfaces if any(a.family in families and a.address == address for a in own))
    return next(found, None)
