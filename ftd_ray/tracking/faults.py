"""Which errors of MLflow pass by themselves."""

import errno

from mlflow.exceptions import MlflowException

LATER = {
    "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED",
    "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
}  # fmt: skip
"""Codes of MLflow's errors after which the same may succeed; no answer at all is the first."""
NO_ANSWER = {
    "ConnectionError", "Timeout", "TimeoutError", "ChunkedEncodingError",
    "HTTPClientError", "OperationalError", "InterfaceError",
}  # fmt: skip
"""By name: of Python, requests, botocore (which need not be installed) and SQLAlchemy."""
LATER_ERRNO = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EPIPE,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ECONNABORTED, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK,
}  # fmt: skip


def transient(error: Exception) -> bool:
    """Whether the same may succeed later: no answer, 5xx, a locked database, a full disk."""
    if isinstance(error, MlflowException):
        return error.error_code in LATER
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return unanswered(error) or (isinstance(error, OSError) and error.errno in LATER_ERRNO)


def unanswered(error: BaseException | None) -> bool:
    """Whether nobody answered at all."""
    return any(c.__name__ in NO_ANSWER for c in type(error).__mro__)
