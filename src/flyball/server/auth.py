"""Who may ask: one key for users, one for admins, both optional; keys come as `Authorization: Bearer KEY`."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from fastapi import Request

from flyball.server.errors import ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The keys of a server; None leaves its routes open to whoever reaches them."""

    user: str | None = None
    admin: str | None = None  # None: the user's key opens the admin routes too

    async def user_guard(self, request: Request) -> None:
        """Let users and admins pass."""
        if self.user is not None and not _bears(request, self.user, self.admin):
            raise _unauthorized()

    async def admin_guard(self, request: Request) -> None:
        """Let admins pass."""
        required = self.admin or self.user
        if required is None or _bears(request, required):
            return
        if _bears(request, self.user):
            raise ApiError(403, "this route needs the admin key; a user's key was given", code="admin_key_required")
        raise _unauthorized()


def _bears(request: Request, *keys: str | None) -> bool:
    """Whether the request carries one of the keys; compared in constant time."""
    given = request.headers.get("authorization", "").encode()
    return any(hmac.compare_digest(given, f"Bearer {key}".encode()) for key in keys if key is not None)


def _unauthorized() -> ApiError:
    return ApiError(401, "no valid key; send the header Authorization: Bearer KEY", code="invalid_api_key")
