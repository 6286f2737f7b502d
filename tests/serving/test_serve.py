"""The checks, the message and the signals of `cappy serve`, without a server; `test_app.py` starts the whole server."""

import os
import signal

import pytest
from ray.serve.config import HTTPOptions

from cluster.config import Config, ServingConfig
from cluster.errors import CappyError, UsageError
from serving import serve


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:9"), ("0.0.0.0", "http://127.0.0.1:9"), ("::1", "http://[::1]:9")]
)
def test_the_url_is_one_that_this_machine_can_open(host, url):
    assert serve.base_url(ServingConfig(host=host, port=9)) == url


def message(additional=(), **serving):
    return serve.ready_message(Config(serving=ServingConfig(**serving)), "http://127.0.0.1:8000", additional)


def test_the_ready_message_has_the_models_the_page_and_a_command_to_try():
    text = message()
    assert text.startswith("serve: ready at http://127.0.0.1:8000/v1") and "model 'cappy'" in text
    assert "web page: http://127.0.0.1:8000/;" in text and "curl -s http://127.0.0.1:8000/v1/chat/completions" in text
    assert "Authorization" not in text and "more scorers" not in text and "note:" not in text
    assert "2 more scorers, loaded at the first request for each, e.g. model 'cappy+a'" in message(additional=("a", "b"))
    assert '-H "Authorization: Bearer $CAPPY_API_KEY"' in message(api_keys=[{"name": "a", "sha256": "0" * 64}])


def test_the_ready_message_warns_of_a_server_without_keys_on_the_network():
    assert "serving.host=0.0.0.0 is reachable from other machines, and requests need no key" in message(host="0.0.0.0")
    assert "note:" not in message(host="0.0.0.0", api_keys=[{"name": "a", "sha256": "0" * 64}])


def test_a_server_without_keys_on_the_network_is_refused_unless_the_config_allows_it():
    with pytest.raises(UsageError, match=r"serving\.api_keys is empty; make a key with `cappy serve --new-key NAME`"):
        serve.check_access_and_limits(Config(serving=ServingConfig(host="0.0.0.0")))
    serve.check_access_and_limits(Config(serving=ServingConfig(host="0.0.0.0", allow_no_keys=True)))


def test_a_server_without_a_scorer_uses_the_scorer_of_the_package(tmp_path, capsys):
    config = Config(workspace=str(tmp_path / "run"))
    assert serve.with_default_scorer(config).scorer_uri == "cappy-minilm"
    assert f"{tmp_path}/run/scorer has no scorer" in capsys.readouterr().err
    given = Config(workspace=str(tmp_path), scorer_path=str(tmp_path / "none"))
    assert serve.with_default_scorer(given) is given
    with pytest.raises(CappyError, match=r"scorer_path=.*none"):
        serve.check_scorer(given)


@pytest.mark.parametrize("name", ["_MANIFEST.json", "config.json", "_checkpoints/lease"])
def test_a_scorer_in_the_workspace_is_used_and_an_unfinished_one_is_not_replaced(name, tmp_path):
    path = tmp_path / "scorer" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    config = Config(workspace=str(tmp_path))
    assert serve.with_default_scorer(config) is config


def test_the_first_signal_stops_the_server_and_later_ones_do_not_disturb_the_shutdown():
    before = signal.getsignal(signal.SIGTERM)
    steps = []
    with pytest.raises(serve._StopSignal), serve._stop_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except serve._StopSignal:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("shutdown completed")
            raise
    assert steps == ["shutdown completed"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("running", [{"host": "0.0.0.0"}, {"host": "127.0.0.1", "port": 9000}, {"host": "10.0.0.1", "port": 8000}])
def test_a_running_serve_with_another_address_is_refused(running):
    with pytest.raises(
        CappyError, match=r"serving\.host=127\.0\.0\.1 and serving\.port=8000, .* listens on .*; set serving\.host"
    ) as caught:
        serve.check_proxy_address(ServingConfig(), HTTPOptions(**running))
    assert f"{running['host']}:{running.get('port', 8000)}" in str(caught.value)


def test_a_running_serve_with_the_same_address_is_joined_although_its_port_is_in_use():
    in_use = CappyError("in use")
    serve.check_proxy_address(ServingConfig(), HTTPOptions(), in_use)
    serve.check_proxy_address(ServingConfig(), None)
    with pytest.raises(CappyError, match="in use"):
        serve.check_proxy_address(ServingConfig(), None, in_use)
