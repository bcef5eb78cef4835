"""Addresses: names turned into numbers once, what may be listened on, and how others reach us.

Rules: 1. nobody listens on all addresses of a machine. 2. A name is looked up once, IPv4 first.
"""

from __future__ import annotations

import ipaddress
import socket

from dtrain.errors import DistNetworkError

__all__ = ["bindable", "endpoint", "local_address", "resolve", "split"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_ALL = ("*", "0.0.0.0", "::", "")


def split(where: str) -> tuple[str, str]:
    """Host and port of "tcp://HOST[:PORT]"; without a port, "0". IPv6 addresses have brackets."""
    rest = where.removeprefix("tcp://")
    host, colon, port = rest.rpartition(":")
    if not colon or rest.endswith("]"):
        host, port = rest, "0"
    return host.strip("[]"), port


def endpoint(host: str, port: int | str) -> str:
    """ "tcp://HOST:PORT", with brackets around an IPv6 address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def resolve(host: str) -> Address:
    """The address of a name or of an address in digits.

    Raises `DistNetworkError` when it has none. Blocks while the system looks it up.
    """
    if host == "localhost":  # whatever the resolver thinks of IPv6
        host = "127.0.0.1"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DistNetworkError(f"cannot find the address of {host!r}: {error}") from error
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return ipaddress.ip_address(found[0][4][0])


def bindable(where: str, *, plain: bool = False) -> str:
    """`where` in digits. Raises `DistNetworkError` when nobody may listen there.

    `plain`: the connections will be neither authenticated nor encrypted.
    """
    host, port = split(where)
    address = None if host in _ALL else resolve(host)
    if address is None or address.is_unspecified or address.is_multicast:
        raise DistNetworkError(
            f"refusing to listen on {where}: that is every address of this machine. Name the one by"
            " which the other hosts reach it",
            address=where,
        )
    if plain and not (address.is_private or address.is_loopback):
        raise DistNetworkError(
            f"refusing to listen on {where} in plain text: {address} is not a private address."
            " Leave out --data-plane plaintext (DTRAIN_DATA_PLANE)",
            address=where,
        )
    return endpoint(str(address), port)


def local_address(host: str) -> str:
    """The address, in digits, by which this host reaches `host`, and `host` it. Sends nothing."""
    address = resolve(host)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))  # a datagram socket's connect only picks a route
        except OSError as error:
            raise DistNetworkError(
                f"no way from this host to {host} ({address}): {error.strerror}"
            ) from error
        return str(probe.getsockname()[0])
