"""Who may ask a server of this machine: nobody through another site's page.

    access = Access("127.0.0.1", 8000)
    access.check(headers, query)  # of a request; raises Denied

A browser sends what any page tells it to. So `Host` must be a name of this server, or
another site could give its own name our address (DNS rebinding). `Origin` and
`Sec-Fetch-Site` must not be another site's; programs that are no browsers send neither.
Where other machines can reach the server, each request needs a token. Stands alone.
"""

import hmac
import ipaddress
import re
import socket
from email.message import Message

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?", re.ASCII)


class Denied(ValueError):
    """What is not answered, with the status of HTTP."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Access:
    """The rules of a server that listens at `host` and `port`. With a `token` every
    request must have it."""

    def __init__(self, host: str, port: int, token: str | None = None):
        self.port, self.token = port, token
        self._any = is_any(host)
        own = f"[{host}]" if ":" in host else host
        self._names = {*LOOPBACK, own.lower()}
        if self._any:
            name = socket.gethostname().lower()
            self._names |= {name, f"{name.removesuffix('.local')}.local"}

    def check(self, headers: Message, query: dict[str, list[str]]) -> None:
        """Raise Denied for a request that may not be answered: 403, or 401 for one without
        the token, which stands in `Authorization: Bearer T` or in `?token=T`."""
        hosts = headers.get_all("Host", [])
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            raise Denied(403, "Host must be the address that the server has printed.")
        origin = headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            raise Denied(403, "Another site's page may not ask this server.")
        if headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            if headers.get("Sec-Fetch-Mode") != "navigate":
                raise Denied(403, "Another site's page may not ask this server.")
        if self.token and not self._has_token(headers, query):
            raise Denied(
                401, "The token is missing or wrong: the server has printed it."
            )

    def _is_own(self, host: str) -> bool:
        found = HOST.fullmatch(host.strip())
        if not found or int(found[2] or 80) != self.port:
            return False
        name = found[1].lower()
        return name in self._names or self._any and is_address(name)

    def _has_token(self, headers: Message, query: dict[str, list[str]]) -> bool:
        kind, _, token = headers.get("Authorization", "").partition(" ")
        given = [token.strip()] if kind.lower() == "bearer" else query.get("token", [])
        own = self.token.encode()
        return any(hmac.compare_digest(one.encode(), own) for one in given)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at that host."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_any(host: str) -> bool:
    """Whether a server listens at all addresses, as at 0.0.0.0: then it is called by any
    address, which no site can have for a name."""
    try:
        return ipaddress.ip_address(host or "0.0.0.0").is_unspecified
    except ValueError:
        return False


def is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False
