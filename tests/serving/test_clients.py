"""Cohere's official client against the gateway on a real socket; OpenAI's is in test_app.py, against the whole server."""

from collections.abc import Iterator

import cohere
import pytest

from cluster.config import Config, ServingConfig
from serving.api_keys import create_key
from serving.gateway import build_api
from tests.serving.standin import Echo, running

KEY, SHA256 = create_key()
DOCUMENTS = ["x", "xxx", "xx"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    serving = ServingConfig(api_keys=[{"name": "a", "sha256": SHA256}])
    with running(build_api(Config(serving=serving), Echo())) as url:
        yield url


@pytest.mark.parametrize("kind", [cohere.ClientV2, cohere.Client])
def test_coheres_clients_rerank(url, kind):
    answer = kind(api_key=KEY, base_url=url).rerank(model="cappy-scorer", query="q", documents=DOCUMENTS, top_n=2)
    assert [(each.index, each.relevance_score) for each in answer.results] == [(1, 3.0), (2, 2.0)]
    assert answer.meta.billed_units.search_units == 1


def test_coheres_v1_client_gets_the_documents_back_on_request(url):
    documents = [{"text": each} for each in DOCUMENTS]
    answer = cohere.Client(api_key=KEY, base_url=url).rerank(model="cappy-scorer", query="q", documents=documents, return_documents=True)
    assert [each.document.text for each in answer.results] == ["xxx", "xx", "x"]


def test_coheres_client_maps_the_errors_to_its_exceptions(url):
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2(api_key="cappy-wrong", base_url=url).rerank(model="cappy-scorer", query="q", documents=DOCUMENTS)
    mine = cohere.ClientV2(api_key=KEY, base_url=url)
    with pytest.raises(cohere.NotFoundError):
        mine.rerank(model="rerank-v4.0", query="q", documents=DOCUMENTS)
    with pytest.raises(cohere.BadRequestError):
        mine.rerank(model="cappy-scorer", query="q", documents=[])
