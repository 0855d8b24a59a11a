"""Secrets are removed wherever they stand in a text or a log record, and nothing else is."""

from __future__ import annotations

import io
import logging

import pytest

from rwkvq.redaction import HIDDEN, SecretsFilter, without_secrets

SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"https://anna:{SECRET}@example.org/path", "example.org/path"),
        (f"s3://{SECRET}@bucket/key", "bucket/key"),
        (f"postgresql+asyncpg://u:p@{SECRET}@db:5432/prefect failed", "db:5432/prefect failed"),
        (f"GET http://h/a?token={SECRET}&page=2#end", "&page=2#end"),
        (f"http://h/a?page=2&X-Amz-Signature={SECRET}", "page=2&X-Amz-Signature="),
        (f"http://h/a?sig={SECRET};x=1", ";x=1"),
        (f"http://h/a?api_key={SECRET} and more", " and more"),
        (f"https://hooks.slack.com/services/T0/B0/{SECRET}", "hooks.slack.com"),
        (f"https://discord.com/api/webhooks/1/{SECRET}", "discord.com/api/webhooks/"),
        (f"Authorization: Bearer {SECRET}.abc-def", "Authorization: Bearer"),
    ],
)
def test_a_secret_in_a_url_is_hidden_and_the_rest_stays(text: str, kept: str) -> None:
    hidden = without_secrets(text)
    assert SECRET not in hidden and HIDDEN in hidden and kept in hidden


@pytest.mark.parametrize(
    "name", ["PREFECT_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "ALERT_WEBHOOK_URL", "MY_APIKEY"]
)
def test_the_value_of_a_secret_variable_is_hidden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    assert without_secrets(f"sent {SECRET}, {SECRET}!") == f"sent {HIDDEN}, {HIDDEN}!"


def test_a_secret_that_holds_another_goes_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdef")
    monkeypatch.setenv("B_TOKEN", "abcdefghijkl")
    assert without_secrets("abcdefghijkl") == HIDDEN


@pytest.mark.parametrize(
    "text",
    [
        "block-003: gptq lost 0.05 of the output",
        "http://127.0.0.1:4200/api/flow_runs?limit=3",
        "mail to anna@example.org, see https://example.org/a@b",
        "tokens: 8192, key: blocks.0.att.key.weight",
    ],
)
def test_ordinary_text_stays(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("USE_TOKEN", "1")  # too short to be a secret
    monkeypatch.setenv("HOME_OF_ANNA", "blocks")
    assert without_secrets(text) == text


def test_the_filter_cleans_message_arguments_traceback_and_records_of_lower_loggers() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(SecretsFilter())
    logger = logging.getLogger("redaction-test")
    logger.addHandler(handler)
    lower = logging.getLogger("redaction-test.below")
    try:
        lower.warning("cannot reach %s in %d s", f"http://u:{SECRET}@host/x", 3)
        try:
            raise ValueError(f"http://u:{SECRET}@host/y")
        except ValueError:
            lower.exception("failed", stack_info=True)
    finally:
        logger.removeHandler(handler)
    shown = stream.getvalue()
    assert SECRET not in shown
    assert f"cannot reach http://{HIDDEN}@host/x in 3 s" in shown
    assert "Traceback" in shown and f"ValueError: http://{HIDDEN}@host/y" in shown and "Stack" in shown
