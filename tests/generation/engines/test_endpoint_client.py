import pytest

from cluster.config import EndpointConfig, SamplerConfig
from cluster.errors import UsageError
from generation.engines import check_sampler_config
from generation.engines.endpoint_client import open_http

LOCAL = "http://127.0.0.1:9/v1"


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "ALL_PROXY",
            "socks5://user:secret@proxy:1080",
            r"ALL_PROXY=socks5://<redacted>@proxy:1080 names a SOCKS proxy, .* socksio; use an http",
        ),
        ("https_proxy", "socks4://proxy:1080", r"https_proxy=socks4://proxy:1080 cannot be used: Unknown scheme"),
        ("HTTP_PROXY", "http://user:secret@proxy:port", r"HTTP_PROXY=http://<redacted>@proxy:port cannot be used: Invalid port"),
        ("HTTP_PROXY", "user:secret@proxy:port", r"HTTP_PROXY=<redacted>@proxy:port cannot be used: "),
        ("SSL_CERT_FILE", "/no/such/file", r"certificates of SSL_CERT_FILE=/no/such/file.* cannot be read: .*No such file"),
    ],
)
def test_a_proxy_or_certificate_that_cannot_be_used_is_one_line_before_the_run(no_proxies, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    config = SamplerConfig(model="fox-1", engine={"kind": "endpoint", "base_url": LOCAL})
    with pytest.raises(UsageError, match=message) as caught:
        check_sampler_config(config)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["http://proxy:3128", "proxy:3128", ""])
def test_a_proxy_that_works_is_accepted(no_proxies, monkeypatch, value):
    monkeypatch.setenv("HTTP_PROXY", value)
    open_http(EndpointConfig(kind="endpoint", base_url=LOCAL), None)


@pytest.mark.parametrize("url", ["http://host:99999/v1", "http://host:port/v1", "http:///v1", "http://[::1/v1"])
def test_an_address_that_cannot_be_used_is_one_line(no_proxies, url):
    with pytest.raises(UsageError, match=r"sampler\.engine\.base_url=.*; correct it"):
        open_http(EndpointConfig(kind="endpoint", base_url=url), None)


@pytest.mark.parametrize("key", ["sk-\u201cfox\u201d", "sk fox", "sk\nfox", "sk-\xe9"])
def test_a_key_that_no_header_can_hold_is_one_line_without_the_key(no_proxies, monkeypatch, key):
    monkeypatch.setenv("FOX_KEY", key)
    config = SamplerConfig(model="fox-1", engine={"kind": "endpoint", "base_url": LOCAL, "api_key_env": "FOX_KEY"})
    with pytest.raises(UsageError, match=r"sampler\.engine\.api_key_env=FOX_KEY: the key has spaces") as caught:
        check_sampler_config(config)
    assert key not in str(caught.value)
