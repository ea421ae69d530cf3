"""HTTP to a cloud's metadata server: link-local, without proxies, redirects, or trust in what comes back."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import aiohttp

# Documents of notices have a few hundred bytes; more is not one.
MAX_BODY_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 2.0


class SourceError(Exception):
    """A source could not tell whether a notice is pending. Text is the same for the same trouble: it is logged once."""


@dataclass(frozen=True, slots=True)
class MetadataResponse:
    """An answer, whatever its status. `headers` has lower-case names."""

    status: int
    text: str
    headers: Mapping[str, str]


class Metadata:
    """A client for metadata servers; `async with` it, or call `close`.

    aiohttp, because the extra `serve` has it already (Ray needs it) and because, unlike others, it asks no proxy unless
    told to: these addresses must never leave the machine. A connection per request: polls are seconds apart, and a
    server that went and came back is met with a new connection.
    """

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Metadata":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the open connections; a later request opens new ones."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        timeout_s: float,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> MetadataResponse:
        """The server's answer within `timeout_s`.

        Raises: SourceError when there is none, or when it is longer than MAX_BODY_BYTES.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_TIMEOUT_S, timeout_s))
        what = f"{method} {url}"
        try:
            async with self._session.request(
                method, url, headers=headers, params=params, data=body, timeout=timeout, allow_redirects=False
            ) as response:
                raw = bytearray()
                async for chunk in response.content.iter_any():
                    raw += chunk
                    if len(raw) > MAX_BODY_BYTES:
                        raise SourceError(f"{what}: the answer is longer than {MAX_BODY_BYTES} bytes")
                names = {name.lower(): value for name, value in response.headers.items()}
                return MetadataResponse(response.status, raw.decode("utf-8", errors="replace"), names)
        except TimeoutError as error:
            raise SourceError(f"{what}: no answer in {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise SourceError(f"{what}: {type(error).__name__}") from error


def unexpected(what: str, response: MetadataResponse) -> SourceError:
    """The error for a status that the documentation does not name."""
    return SourceError(f"{what}: HTTP {response.status}")
