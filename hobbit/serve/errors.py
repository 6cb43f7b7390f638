"""What a client is told when a request fails."""

from __future__ import annotations

from typing import Any

from ..errors import Cancelled, HobbitError, PlanError, UnsupportedModelError, UsageError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    501: "not_supported_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class HttpError(Exception):
    """A request that is answered with an error; `headers` go with it."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI writes it."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"code": self.status, "message": str(self), "type": kind}}


def as_http(error: BaseException) -> HttpError:
    """Return what an error of the model or of a request means to its client."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, Cancelled):
        return HttpError(503, "the server stopped before the answer was complete")
    if isinstance(error, PlanError):
        return HttpError(409, str(error))
    if isinstance(error, UsageError | UnsupportedModelError):
        return HttpError(400, str(error))
    if isinstance(error, HobbitError):
        return HttpError(500, str(error))
    return HttpError(500, f"{type(error).__name__}: {error}")
