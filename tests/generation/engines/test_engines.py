import pytest

from cluster.config import SamplerConfig
from cluster.errors import UsageError
from generation import engines
from generation.engines.endpoint import EndpointEngine
from generation.engines.seq2seq import Seq2SeqEngine

ENDPOINT = {"kind": "endpoint", "base_url": "http://h/v1"}


def config(**engine):
    return SamplerConfig(engine=engine)


def test_load_engine_returns_the_engine_of_the_kind(seq2seq):
    of_t5 = SamplerConfig(model=str(seq2seq), engine={"kind": "transformers", "max_prompt_tokens": 64})
    assert isinstance(engines.load_engine(of_t5), Seq2SeqEngine)
    assert isinstance(engines.load_engine(config(**ENDPOINT)), EndpointEngine)


@pytest.mark.parametrize(
    ("engine", "here", "on_gpus"),
    [({"tensor_parallel": 4}, 0, 4), ({}, 0, 1), ({"kind": "transformers"}, 0, 1), (ENDPOINT, 0, 0)],
)
def test_an_actor_requests_as_many_gpus_as_its_engine_uses(engine, here, on_gpus):
    assert engines.actor_resources(config(**engine), cluster_gpus=0) == {"num_cpus": 1, "num_gpus": here}
    assert engines.actor_resources(config(**engine), cluster_gpus=8) == {"num_cpus": 1, "num_gpus": on_gpus}


def test_a_missing_key_or_model_is_an_error_before_loading(monkeypatch):
    monkeypatch.delenv("FOX_KEY", raising=False)
    engines.check_sampler_config(config(**ENDPOINT))
    with pytest.raises(UsageError, match="api_key_env=FOX_KEY: the variable is not set"):
        engines.check_sampler_config(config(**ENDPOINT, api_key_env="FOX_KEY"))
    with pytest.raises(UsageError, match=r"sampler\.model=/no/such: no such folder"):
        engines.check_sampler_config(SamplerConfig(model="/no/such", engine={"kind": "transformers"}))
