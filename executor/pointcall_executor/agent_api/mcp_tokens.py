"""Who may use the MCP server over HTTP: tokens by digest, from one JSON file. Bytes -> Tokens -> a token's rights.

The file holds no token, only SHA-256 of random ones, so it need not be secret; who can write it can let agents in. It
is not the authority over the node: that is the agent's socket. Spec: docs/spec/mcp.md section 3.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Final, Literal, Self

from mcp.server.auth.provider import AccessToken
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pointcall_executor.agent_api.errors import RequestError

MAX_FILE_BYTES: Final = 256 * 1024
MAX_TOKEN_CHARS: Final = 512
READ: Final = "runs:read"
PROPOSE: Final = "proposals:write"


def _instant(value: object) -> datetime:
    at = datetime.fromisoformat(value) if isinstance(value, str) else None
    if at is None or at.tzinfo is None:
        raise ValueError("a time is RFC 3339 with its zone")
    return at


_Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


class Row(BaseModel):
    """One token: its digest, whose it is, what for, until when."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    client: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    scopes: Annotated[tuple[Literal["runs:read", "proposals:write"], ...], _Listed]
    expires: Annotated[datetime, BeforeValidator(_instant)]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: Literal["pointcall-agent-tokens/v1"]
    resource: Annotated[str, Field(pattern=r"^https?://[!-~]{1,200}$")]
    tokens: Annotated[tuple[Row, ...], _Listed, Field(max_length=1_000)]


class Tokens:
    """A TokenVerifier of the MCP library. `resource` is the URL that these tokens are for."""

    def __init__(self, resource: str, rows: tuple[Row, ...], clock_s: Callable[[], float] = time.time) -> None:
        self.resource, self._rows, self._clock_s = resource, rows, clock_s

    @classmethod
    def parse(cls, raw: bytes, clock_s: Callable[[], float] = time.time) -> Self:
        """RequestError `mcp.tokens` unless this is a token file."""
        try:
            if len(raw) > MAX_FILE_BYTES:
                raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
            file = _File.model_validate_json(raw)
        except (ValidationError, ValueError) as fault:
            what = "; ".join(e["msg"] for e in fault.errors()) if isinstance(fault, ValidationError) else str(fault)
            raise RequestError("not a token file", id="mcp.tokens", want="docs/spec/mcp.md", got=what[:200]) from None
        return cls(file.resource, file.tokens, clock_s)

    async def verify_token(self, token: str) -> AccessToken | None:
        """The rights of a token, or None. Every row is compared, so that the time says nothing about which one fits."""
        digest = hashlib.sha256(token[:MAX_TOKEN_CHARS].encode(errors="replace")).hexdigest()
        found = [row for row in self._rows if hmac.compare_digest(row.sha256, digest)]
        if not found or len(token) > MAX_TOKEN_CHARS or self._clock_s() >= found[0].expires.timestamp():
            return None
        row = found[0]
        return AccessToken(
            token=token,
            client_id=row.client,
            scopes=list(row.scopes),
            expires_at=int(row.expires.timestamp()),
            resource=self.resource,
        )
