import pytest

from cluster.config import EndpointConfig, PromptConfig, SamplerConfig, Seq2SeqConfig, VLLMConfig, fingerprint

ENDPOINT = {"kind": "endpoint", "base_url": "http://h/v1"}


def test_the_settings_of_a_run_are_those_of_the_first_version_by_default():
    assert fingerprint(SamplerConfig()) == "e2c9e85e51a66424"
    endpoint = SamplerConfig(engine=ENDPOINT).result_settings()
    assert endpoint.keys() == {"model", "prompt", "decodings", "engine"} and endpoint["engine"] == ENDPOINT
    assert endpoint["prompt"] == {"form": "chat", "system": None, "shots": 0, "shots_by": "seed"}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "org/model@v2"},
        {"reasoning": "keep"},
        {"prompt": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"engine": {**ENDPOINT, "logprobs": False}},
        {"engine": {**ENDPOINT, "omit": ["temperature"]}},
        {"engine": {**ENDPOINT, "base_url": "http://other/v1"}},
    ],
)
def test_a_setting_that_changes_the_candidates_belongs_to_the_identity_of_a_run(change):
    plain = SamplerConfig(engine=ENDPOINT)
    changed = SamplerConfig(**{"engine": ENDPOINT, **change})
    assert fingerprint(changed.result_settings()) != fingerprint(plain.result_settings())
    assert SamplerConfig(**changed.model_dump(mode="json")) == changed


@pytest.mark.parametrize(
    "change",
    [
        {"replicas": 1},
        {"max_empty_share": 1.0},
        {"engine": {**ENDPOINT, "max_pauses": 9, "max_retry_after_s": 9, "tries": 2, "concurrency": 2}},
    ],
)
def test_a_setting_of_the_work_alone_can_change_between_attempts(change):
    plain = SamplerConfig(engine=ENDPOINT)
    assert SamplerConfig(**{"engine": ENDPOINT, **change}).result_settings() == plain.result_settings()


@pytest.mark.parametrize(
    "section", [SamplerConfig(), PromptConfig(), VLLMConfig(), EndpointConfig(**ENDPOINT), Seq2SeqConfig(kind="transformers")]
)
def test_a_section_is_equal_after_a_dump(section):
    assert type(section)(**section.model_dump(mode="json")) == section
    assert not set(getattr(section, "added", ())) & section.model_dump().keys()


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "messages", "tools"])
def test_arguments_of_the_template_function_are_not_variables_of_the_template(name):
    with pytest.raises(ValueError, match=f"{name} is not a variable of the template, because Cappy sets it; leave it out"):
        PromptConfig(chat_template_kwargs={name: True})


def test_only_parameters_of_a_request_can_be_omitted():
    with pytest.raises(ValueError, match="Input should be 'n', 'logprobs'"):
        EndpointConfig(**ENDPOINT, omit=("model",))
