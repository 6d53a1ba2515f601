"""Failures as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` and a fitting status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from flyball.core.errors import (
    ContextLengthExceeded,
    EngineFailed,
    FlyballError,
    InvalidInput,
    InvalidKnob,
    MissingExtra,
    QueueFull,
    VersionConflict,
)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str  # one sentence: what was given, what is needed, what to do
    type: str
    param: str | None  # the field it is about
    code: str


class ErrorBody(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


class ApiError(FlyballError):
    """A refusal that knows its HTTP status, and which field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers


class BodyTooLarge(HTTPException):
    """Raised while a body is read; FastAPI turns everything but an HTTPException into a 400 there."""


def invalid(param: str, message: str) -> ApiError:
    """A field that cannot be used as it is."""
    return ApiError(400, message, code="invalid_value", param=param)


def body_too_large(message: str) -> ApiError:
    """More than one request may send."""
    return ApiError(413, message, code="body_too_large")


_STATUS: tuple[tuple[type[FlyballError], int, str], ...] = (  # the first that fits
    (ContextLengthExceeded, 400, "context_length_exceeded"),
    (InvalidKnob, 400, "invalid_knob"),
    (VersionConflict, 412, "version_conflict"),
    (InvalidInput, 400, "invalid_value"),
    (MissingExtra, 501, "not_installed"),
    (EngineFailed, 503, "engine_failed"),
)


def classify(error: Exception) -> ApiError:
    """The HTTP face of an error; what nobody foresaw becomes a 500 that tells the client nothing of our insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        headers = {"retry-after": str(math.ceil(error.retry_after_s))}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return ApiError(status, str(error), code=code)
    return ApiError(500, "internal server error; the server's log says more", code="internal_error")


def error_body(error: Exception) -> dict[str, Any]:
    """OpenAI's error object."""
    api = classify(error)
    return {"error": {"message": str(api), "type": _type(api.status), "param": api.param, "code": api.code}}


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error"
    )


def install(app: FastAPI) -> None:
    """Answer every failure of an app in this form."""

    async def flyball_error(_request: Request, error: Exception) -> JSONResponse:
        api = classify(error)
        return JSONResponse(error_body(api), api.status, api.headers)

    async def bad_body(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        api = _bad_field(error)
        return JSONResponse(error_body(api), api.status)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, BodyTooLarge):
            return JSONResponse(error_body(body_too_large(error.detail)), error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}; see /openapi.json for what there is"
        api = ApiError(error.status_code, message, code=HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"))
        return JSONResponse(error_body(api), api.status, error.headers)

    async def nobody_there(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # nginx's code for a client that left; only our own log sees it

    def document() -> dict[str, Any]:
        """The OpenAPI document, with our errors in the place of the 422 that FastAPI would answer with."""
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operations in made["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                made["components"]["schemas"].pop(name, None)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend the document
    app.add_exception_handler(ClientDisconnect, nobody_there)
    app.add_exception_handler(FlyballError, flyball_error)
    app.add_exception_handler(RequestValidationError, bad_body)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, flyball_error)


def _bad_field(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a body, in one sentence that names the field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    if len(first["loc"]) == 1:
        return ApiError(
            400, "the body must be a JSON object, sent with content-type: application/json", code="invalid_json"
        )
    field = str(first["loc"][1])
    same = [one for one in error.errors() if one["loc"][:2] == first["loc"][:2]]  # one for each form it could have had
    where = ".".join(map(str, first["loc"][1:])) if len(same) == 1 else field
    reasons = "; or ".join(dict.fromkeys(str(one["msg"]) for one in same))
    return ApiError(400, f"{where}: {reasons}", code="invalid_value", param=field)
