"""Credentials in URLs: replaced in errors, log lines and published configs."""

import json
import pickle

import pytest

from cluster import artifacts, progress, redaction, storage
from cluster.config import Config, TrainingConfig
from cluster.errors import CappyError, UsageError, first_line

URL = "https://me:hunter2@mlflow.example.org/api?token=hunter3#run"
SAFE = "https://<redacted>@mlflow.example.org/api?token=<redacted>#run"


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (URL, SAFE),
        (f"training.mlflow={URL}: no answer", f"training.mlflow={SAFE}: no answer"),
        (f'{{"a": "{URL}", "b": "x@y"}}', f'{{"a": "{SAFE}", "b": "x@y"}}'),
        ("http://hunter2@host:8000/path", "http://<redacted>@host:8000/path"),
        ("socks5h://u:hun@ter2@proxy:1080", "socks5h://<redacted>@proxy:1080"),
        ("https://u:hunter/2?@host/x", "https://<redacted>@host/x"),
        ("s3://key:hunter2@bucket/a b", "s3://<redacted>@bucket/a b"),
        ("postgresql+psycopg://u:hunter2@db/x?sslmode=hunter3&a=1", "postgresql+psycopg://<redacted>@db/x?sslmode=<redacted>&a=<redacted>"),
        ("https://b.s3.amazonaws.com/k?X-Amz-Signature=hunter2", "https://b.s3.amazonaws.com/k?X-Amz-Signature=<redacted>"),
        ("https://host/cb#access_token=hunter2", "https://host/cb#access_token=<redacted>"),
        ("http://127.0.0.1:9000/models/a@b", "http://127.0.0.1:9000/models/a@b"),
        ("https://host/a@1.0 and me@example.org", "https://host/a@1.0 and me@example.org"),
        ("no URL: a?b=c", "no URL: a?b=c"),
    ],
)
def test_credentials_in_the_urls_of_a_text_are_replaced_and_nothing_else(text, safe):
    assert redaction.redact_text(text) == safe
    assert "hunter" not in safe


@pytest.mark.parametrize("kind", [CappyError, UsageError])
def test_an_error_has_no_credentials_not_even_after_pickling(kind):
    error = pickle.loads(pickle.dumps(kind(f"training.mlflow={URL}: no answer")))
    assert str(error) == f"training.mlflow={SAFE}: no answer"
    assert first_line(ValueError(URL)) == SAFE


def test_a_log_line_has_no_credentials(capsys):
    progress.log(f"training.mlflow: {URL}")
    assert capsys.readouterr().err.strip() == f"training.mlflow: {SAFE}"


def test_a_published_config_has_no_credentials(tmp_path):
    config = Config(training=TrainingConfig(mlflow=URL))
    artifacts.publish_folder(str(tmp_path), "scorer", files={}, summary={}, config=config)
    manifest = json.loads(storage.read_bytes(f"{tmp_path}/{artifacts.MANIFEST}"))
    assert manifest["config"]["training"]["mlflow"] == SAFE
    assert "hunter" not in config.to_yaml() and SAFE in config.to_yaml()
