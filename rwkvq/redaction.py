"""Secrets stay out of logs and messages: passwords and keys in URLs, and the values of secret environment variables."""

from __future__ import annotations

import logging
import os
import re

HIDDEN = "***"
MIN_SECRET = 6
"""Shorter values of variables are left alone: replacing every `1` or `true` in a log would hide more than a secret."""
_SECRET_WORDS = (
    "TOKEN|SECRET|PASSWORD|PASSWD|WEBHOOK|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|ACCOUNT_?KEY|CREDENTIAL|AUTH_STRING"
)
_VARIABLE = re.compile(_SECRET_WORDS)
_USER = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"<>]*@")
"""Everything up to the last @ before the path: a password may hold an @ itself."""
_QUERY = re.compile(
    r"(?P<name>[?&;][^\s=&;#'\"<>]*(?:token|key|secret|signature|sig|password|passwd|credential|auth|code)[^\s=&;#'\"<>]*=)"
    r"[^\s&;#'\"<>]+",
    re.IGNORECASE,
)
_HOOK = re.compile(r"(?P<start>https?://(?:hooks\.slack\.com/|[^\s/]+/(?:api/)?webhooks?/))[^\s'\"<>]+", re.IGNORECASE)
_HEADER = re.compile(
    r"(?P<name>\b(?:authorization\s*[:=]\s*)?(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """`text` with secrets replaced by `***`; all else stays as it is.

    Secret are user and password of a URL, its query values with a name like token or key, the path of a webhook, a
    bearer token, and the value of every environment variable with a name like *TOKEN*, *PASSWORD* or *WEBHOOK*.
    """
    for value in _secret_values():
        text = text.replace(value, HIDDEN)
    text = _USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _QUERY.sub(rf"\g<name>{HIDDEN}", text)
    text = _HOOK.sub(rf"\g<start>{HIDDEN}", text)
    return _HEADER.sub(rf"\g<name>{HIDDEN}", text)


def _secret_values() -> list[str]:
    """Longest first: a secret that holds another one goes as a whole."""
    values = {value for name, value in os.environ.items() if _VARIABLE.search(name.upper())}
    return sorted((value for value in values if len(value) >= MIN_SECRET), key=len, reverse=True)


class SecretsFilter(logging.Filter):
    """Lets every record pass, with secrets removed from its message, its traceback and its stack.

    Belongs on handlers: the filters of a logger do not see the records of the loggers below it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; True."""
        record.msg, record.args = without_secrets(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            # a formatter takes this text as it is and does not format exc_info again
            record.exc_text = without_secrets(record.exc_text)
        if record.stack_info:
            record.stack_info = without_secrets(record.stack_info)
        return True
