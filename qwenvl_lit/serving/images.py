"""Images of requests: data URIs, and http addresses of allowed hosts. Never a file of this machine.

An address is fetched from the very address that was checked to be public, without redirects and
without proxies, within limits of bytes and time. An image is decoded only if its header promises no
more pixels than the limit.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import time
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

from qwenvl_lit.data.download.connections import Hosts, Limits, RetryableError, opened
from qwenvl_lit.data.download.files import USER_AGENT, format_bytes
from qwenvl_lit.images import AS_STORED, ImageOptions
from qwenvl_lit.types import BadImage, DataError, ImageSource

BLOCK = 1 << 16  # bytes read at a time
PORTS = {"http": 80, "https": 443}
NO_PRIVATE = "private and loopback addresses are never fetched"
SHOWN = 100  # characters of an address in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLoader:
    """Opens the images of requests.

    Args:
        allowed_hosts: hosts that images may be fetched from, as `example.com` for the usual ports
            or `example.com:8080`.
        max_bytes: of an encoded image.
        max_pixels: of a decoded image.
        seconds: for fetching an image.
        options: how images are decoded.
    """

    allowed_hosts: Collection[str] = ()
    max_bytes: int
    max_pixels: int
    seconds: float
    options: ImageOptions = AS_STORED

    def load(self, url: str) -> ImageSource:
        """Returns the image at a data URI or an address.

        Raises:
            DataError: it is neither, the address may not be fetched or fails, or the image is
                broken or too large.
        """
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            content = self._from_data_uri(url)
        elif scheme.startswith(("http://", "https://")):
            content = self._fetched(url)
        else:
            raise DataError(
                f"{url[:SHOWN]!r} is no image; give a data URI, data:image/png;base64,..., or an "
                f"http or https address"
            )
        image = ImageSource(content, self.options)
        width, height = image.size
        if width * height > self.max_pixels:
            raise BadImage(
                f"the image has {width} x {height} pixels, more than {self.max_pixels:,}; "
                f"scale it down"
            )
        return image

    def _from_data_uri(self, uri: str) -> bytes:
        head, comma, data = uri.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise DataError(f"{uri[:40]!r} is no data URI with ;base64, before its data")
        encoded = unquote_to_bytes(data) if "%" in data[:SHOWN] else data.encode("utf-8", "replace")
        if len(encoded) * 3 // 4 > self.max_bytes + 2:  # two characters may be padding
            raise self._too_large()
        try:
            return base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise DataError(f"the data URI is not valid base64: {error}") from None

    def _fetched(self, url: str) -> bytes:
        self._check_host(url)
        limits = Limits(idle_seconds=self.seconds, deadline=time.monotonic() + self.seconds)
        hosts = Hosts(url=url, allow_private=False, hint=NO_PRIVATE)
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        try:
            with opened(url, headers, limits=limits, hosts=hosts, direct=True) as response:
                return self._body(response)
        except (RetryableError, http.client.HTTPException, OSError) as error:
            raise DataError(f"{url[:SHOWN]} cannot be fetched: {error}") from None

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.headers["Content-Encoding"] not in (None, "identity"):
            raise DataError("the server of the image compresses it, although asked not to")
        if (response.length or 0) > self.max_bytes:
            raise self._too_large()
        body = bytearray()
        while block := response.read1(BLOCK):
            body += block
            if len(body) > self.max_bytes:
                raise self._too_large()
        if response.length:
            raise DataError(f"the transfer of the image ended {response.length} bytes early")
        return bytes(body)

    def _check_host(self, url: str) -> None:
        try:
            address = urlsplit(url)
            host, port = (address.hostname or "").rstrip("."), address.port
        except ValueError as error:
            raise DataError(f"{url[:SHOWN]!r} is not an address: {error}") from None
        if address.username is not None or address.password is not None:
            raise DataError("an address with a user name or a password is not fetched")
        usual = PORTS[address.scheme]
        name = host if port in (None, usual) else f"{host}:{port}"
        allowed = {entry.lower().rstrip(".") for entry in self.allowed_hosts}
        if not host or name not in allowed:
            raise DataError(
                f"images are not fetched from {name[:SHOWN]!r}: the host is not in "
                f"serve.allowed_hosts; send the image as a data URI"
            )

    def _too_large(self) -> BadImage:
        return BadImage(f"the image has more than {format_bytes(self.max_bytes)}; scale it down")
