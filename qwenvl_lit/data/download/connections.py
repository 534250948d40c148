"""Opens http and https addresses from untrusted rows, within limits that a server cannot outlast.

A connection goes to the address that was checked: a name that resolves to another address the next
time (DNS rebinding) gains nothing. Proxies of the environment (`https_proxy`) are used; a proxy
resolves names itself, so that only addresses written as numbers are checked then.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import string
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from qwenvl_lit.types import DataError

MAX_REDIRECTS = 10
MAX_HEAD_BYTES = 1 << 18  # of an answer before its body: headers, and interim answers (1xx)
PRIVATE_HINT = (
    "fetch it yourself, or if your own data means this host, set data.allow_private_hosts=true"
)

_TEMPORARY = {408, 425, 429}  # HTTP errors below 500 after which it is worth trying again
_REFUSALS = {  # what to do about other HTTP errors than a wrong address
    401: "it needs a login: download it yourself",
    403: (
        "the server refuses this program: download it yourself, or for the images of your rows let "
        "data.user_agent name you or a browser"
    ),
}
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class RetryableError(Exception):
    """A try failed, but another one may succeed."""


class PartMismatchError(RetryableError):
    """The part on disk is not the beginning of the file that the server now has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long an answer may take."""

    idle_seconds: float  # without a single byte; also until all headers have arrived
    deadline: float  # of the whole download, on the clock `time.monotonic`

    def seconds_left(self, end: float | None = None) -> float:
        """Returns how long the next operation on a socket may take.

        Args:
            end: an earlier deadline.

        Raises:
            TimeoutError: the deadline has passed.
        """
        left = min(self.deadline, end or self.deadline) - time.monotonic()
        if left <= 0:
            raise TimeoutError("the server is too slow")
        return min(left, self.idle_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hosts:
    """The hosts that a download may connect to.

    These are all that have public addresses. Loopback, private, link-local, multicast and reserved
    addresses belong to this machine or its network.

    Args:
        url: the address to download.
        allow_private: the host of `url` itself may have any address. Redirects to other such hosts
            are refused all the same.
        hint: the end of the message about a private host.
    """

    url: str
    allow_private: bool
    hint: str = PRIVATE_HINT

    def check(self, host: str, ip: str) -> None:
        """Raises a DataError if `host`, which has the address `ip`, may not be connected to."""
        if is_public(ip):
            return
        named = (urlsplit(self.url).hostname or "").lower()
        if host.strip("[]").lower() != named:
            raise DataError(
                f"{self.url} redirects to {host} ({ip}), which is no public address; "
                f"such redirects are not followed"
            )
        if not self.allow_private:
            raise DataError(
                f"{self.url} is not downloaded: {host} ({ip}) is no public address; {self.hint}"
            )

    def check_proxied(self, host: str) -> None:
        """Checks a host that a proxy connects to. Only the proxy resolves names."""
        ip = _written_address(host)
        if ip:
            self.check(host, ip)


def is_public(ip: str) -> bool:
    """Returns whether an address belongs to the internet, not to this machine or its network.

    >>> [is_public(ip) for ip in ("8.8.8.8", "10.0.0.1", "::1", "::ffff:127.0.0.1")]
    [True, False, False, False]
    """
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = _embedded(address)
        if inner is None:
            return address.is_global and address in _GLOBAL_UNICAST
        address = inner
    return address.is_global and not address.is_multicast


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Returns the IPv4 address that an IPv6 address leads to."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def check_scheme(url: str) -> None:
    """Raises a DataError unless `url` is an http or https address."""
    try:
        scheme = urlsplit(url).scheme.lower()
    except ValueError as error:
        raise DataError(f"{url[:200]!r} is not an address: {error}") from None
    if scheme not in ("http", "https"):
        raise DataError(f"{url[:200]!r} is not an http or https address; no other is downloaded")


@contextmanager
def opened(
    url: str, headers: Mapping[str, str], *, limits: Limits, hosts: Hosts, direct: bool = False
) -> Iterator[http.client.HTTPResponse]:
    """Yields the answer to a request for `url`; its body is read within `limits`.

    Args:
        direct: follow no redirect, and use no proxy.

    Raises:
        DataError: the server refuses, the address is broken, or it leads to a host that is not one
            of `hosts`.
        RetryableError: the server cannot be reached now.
        PartMismatchError: the server does not have the range that `headers` name.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler({} if direct else None),
        _Requests(hosts, limits),
        _Redirects(url, follow=not direct),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    try:
        # Spaces and letters beyond ASCII are quoted as browsers do.
        ascii_url = quote(url, safe=string.punctuation)
        request = urllib.request.Request(ascii_url, headers=dict(headers))
        response = opener.open(request, timeout=limits.seconds_left())
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"the server says {error.code} {error.reason}"
        if error.code == 416:  # range not satisfiable
            raise PartMismatchError(reason) from None
        if error.code < 500 and error.code not in _TEMPORARY:
            advice = _REFUSALS.get(error.code, "check the address")
            raise DataError(f"{url} cannot be downloaded: {reason}; {advice}") from None
        raise RetryableError(reason) from None
    except DataError:
        raise
    except (ValueError, http.client.InvalidURL) as error:
        raise DataError(f"{url} is not an address: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise RetryableError(_no_answer(error)) from None
    with response:
        response.begin_body()
        yield response


def _no_answer(error: Exception) -> str:
    """Returns why a server could not be asked."""
    reason = getattr(error, "reason", error)  # urllib wraps errors of a socket
    if isinstance(reason, socket.gaierror):
        return f"unknown host ({reason.strerror})"
    return f"no answer: {reason}"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https addresses only, or none."""

    max_redirections = MAX_REDIRECTS
    inf_msg = "after too many redirects: "

    def __init__(self, url: str, *, follow: bool):
        self.url = url
        self.follow = follow

    def http_error_302(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> Any:
        if not self.follow:
            fp.close()
            raise DataError(f"{self.url} redirects to another address, which is not followed")
        location = headers["location"]
        if location:
            target = urljoin(req.full_url, location)
            try:
                check_scheme(target)
            except DataError as error:
                raise DataError(f"{self.url} redirects, but {error}") from None
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Requests(urllib.request.AbstractHTTPHandler):
    """Sends requests over connections that check hosts and keep limits."""

    def __init__(self, hosts: Hosts, limits: Limits):
        super().__init__()
        self.hosts = hosts
        self.limits = limits

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_HTTPConnection, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_HTTPSConnection, request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _open(self, connection: Any, request: urllib.request.Request) -> Any:
        target = urlsplit(request.full_url)
        hosts: Hosts | None = self.hosts
        if request.host != unquote(target.netloc):  # ProxyHandler has set the proxy's
            self.hosts.check_proxied(target.hostname or "")
            hosts = None
        return self.do_open(partial(connection, hosts=hosts, limits=self.limits), request)


class _HTTPConnection(http.client.HTTPConnection):
    """A connection to an address that was checked.

    Args:
        hosts: None for a proxy, which the user's environment names.
    """

    def __init__(self, host: str, *, hosts: Hosts | None, limits: Limits, **options: Any):
        super().__init__(host, **options)
        # No public attribute of http.client lets a connection go to a given address; tests notice
        # if this one is ignored.
        self._create_connection = partial(_connect, hosts=hosts, limits=limits)
        self.response_class = partial(_Response, limits=limits)  # type: ignore[assignment]


class _HTTPSConnection(_HTTPConnection, http.client.HTTPSConnection):
    """The same with TLS, whose certificate is checked against the host's name."""


def _connect(
    address: tuple[str, int], *_: Any, hosts: Hosts | None, limits: Limits
) -> socket.socket:
    """Connects to the first address of a host that answers."""
    host, port = address
    failure = OSError(f"{host} has no address")
    for family, kind, protocol, _name, target in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        if hosts is not None:
            hosts.check(host, str(target[0]))
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(limits.seconds_left())
            connection.connect(target)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


class _Response(http.client.HTTPResponse):
    """An answer that is read within limits, from the first byte of its headers on."""

    def __init__(self, sock: socket.socket, *args: Any, limits: Limits, **options: Any):
        self._stream = _LimitedStream(sock, limits)
        # The base class asks its first argument for `makefile` and forgets it.
        super().__init__(self, *args, **options)  # type: ignore[arg-type]

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._stream)

    def begin_body(self) -> None:
        """Lifts the limits that hold for headers."""
        self._stream.in_head = False


class _LimitedStream(io.RawIOBase):
    """The bytes that a socket receives.

    Raises:
        TimeoutError: headers or the whole download take too long.
        HTTPException: there are more bytes before the body than `MAX_HEAD_BYTES`.
    """

    def __init__(self, sock: socket.socket, limits: Limits):
        self.in_head = True
        self._socket = sock
        self._file = sock.makefile("rb", buffering=0)
        self._limits = limits
        self._head_end = time.monotonic() + limits.idle_seconds
        self._received = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        end = self._head_end if self.in_head else None
        self._socket.settimeout(self._limits.seconds_left(end))
        count = self._file.readinto(buffer)
        self._received += count or 0
        if self.in_head and self._received > MAX_HEAD_BYTES:
            raise http.client.HTTPException(f"more than {MAX_HEAD_BYTES} bytes of headers")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _written_address(host: str) -> str | None:
    """Returns the address that a host is written as, in any notation; None for a name."""
    host = host.strip("[]").lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f.1 or 2130706433
    except OSError:
        return None
