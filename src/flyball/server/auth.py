"""Who may ask: keys for users, one for admins, all optional; a key comes as `Authorization: Bearer KEY`."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import blake2b

from fastapi import Request

from flyball.server.errors import ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The keys of a server; none leave its routes open to whoever reaches them."""

    users: tuple[str, ...] = ()
    admin: str | None = None  # None: the users' keys open the admin routes too

    async def user_guard(self, request: Request) -> None:
        """Let users and admins pass."""
        if self.users and not _bears(request, *self.users, self.admin):
            raise _unauthorized()

    async def admin_guard(self, request: Request) -> None:
        """Let admins pass."""
        required = self.users if self.admin is None else (self.admin,)
        if not required or _bears(request, *required):
            return
        if _bears(request, *self.users):
            raise ApiError(403, "this route needs the admin key; a user's key was given", code="admin_key_required")
        raise _unauthorized()

    def salt(self, request: Request, cache_salt: str | None) -> bytes:
        """What separates one tenant's cached prefixes from another's.

        A prefix found in the cache shows in the latency, so that one tenant could learn of another's prompts: with
        several user keys each has prefixes of its own, and a request may ask for a narrower circle.
        """
        key = request.headers.get("authorization", "") if len(self.users) > 1 else ""
        if not key and cache_salt is None:
            return b""
        return blake2b(f"{len(key)}:{key}{cache_salt or ''}".encode(errors="surrogatepass"), digest_size=16).digest()

    def name(self, request: Request) -> str:
        """Who asks, for records: the admin, or which user; a key is never told."""
        if self.admin is not None and _bears(request, self.admin):
            return "admin"
        return next((f"user {i}" for i, key in enumerate(self.users) if _bears(request, key)), "anyone")


def _bears(request: Request, *keys: str | None) -> bool:
    """Whether the request carries one of the keys; compared in constant time."""
    given = request.headers.get("authorization", "").encode()
    return any(hmac.compare_digest(given, f"Bearer {key}".encode()) for key in keys if key is not None)


def _unauthorized() -> ApiError:
    return ApiError(
        401,
        "no valid key; send the header Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )
