import json

import pytest

from cluster.config import ServingConfig
from serving import scoring_api
from serving.backend import ApiError
from serving.scoring_api import ClassifyRequest, RerankRequest, ScoreRequest


def parse(kind, **body):
    return scoring_api.parse_scoring_request(
        kind, json.dumps({"model": "m", **body}).encode(), ServingConfig(max_pairs=10, max_pairs_chars=1000)
    )


def scored(*scores):
    return {"scores": list(scores), "tokens": [7] * len(scores)}


@pytest.mark.parametrize(
    ("body", "pairs"),
    [
        ({"text_1": "a", "text_2": "b"}, (["a"], ["b"])),
        ({"text_1": "a", "text_2": ["b", "c"]}, (["a", "a"], ["b", "c"])),
        ({"text_1": ["a"], "text_2": ["b", "c"]}, (["a", "a"], ["b", "c"])),
        ({"text_1": ["a", "d"], "text_2": ["b", "c"]}, (["a", "d"], ["b", "c"])),
        ({"queries": "a", "documents": ["b"]}, (["a"], ["b"])),
    ],
)
def test_one_text_pairs_with_each_of_the_others_and_equal_lists_pair_by_position(body, pairs):
    assert parse(ScoreRequest, **body).pairs() == pairs


def test_cohere_documents_may_be_objects_with_a_text():
    request = parse(RerankRequest, query="q", documents=["a", {"text": "b", "id": 3}])
    assert request.pairs() == (["q", "q"], ["a", "b"])


def test_documents_are_ranked_best_first_and_equal_scores_keep_their_order():
    request = parse(RerankRequest, query="q", documents=["a", "b", "c"])
    answer = scoring_api.build_rerank_answer(request, scored(0.2, 0.9, 0.9), "1", version=1)
    assert [(each.index, each.relevance_score, each.document.text) for each in answer.results] == [
        (1, 0.9, "b"),
        (2, 0.9, "c"),
        (0, 0.2, "a"),
    ]
    assert answer.usage.total_tokens == 21


@pytest.mark.parametrize(
    ("version", "return_documents", "expected"), [(1, None, True), (2, None, False), (1, False, False), (2, True, True)]
)
def test_return_documents_has_the_default_of_each_api(version, return_documents, expected):
    request = parse(RerankRequest, query="q", documents=["a", "b"], return_documents=return_documents, top_n=1)
    (only,) = scoring_api.build_rerank_answer(request, scored(0, 1), "1", version=version).results
    assert only.index == 1 and (only.document is not None) is expected


def test_top_n_0_returns_all_documents_as_in_vllm():
    request = parse(RerankRequest, query="q", documents=["a", "b"], top_n=0)
    assert len(scoring_api.build_rerank_answer(request, scored(0, 1), "1", version=1).results) == 2


def test_classify_returns_the_first_choice_with_the_highest_score():
    request = parse(ClassifyRequest, instruction="is 3 odd?", choices=["no", "yes", "sure"])
    answer = scoring_api.build_classification(request, scored(0.1, 0.8, 0.8), "1", 5)
    assert (answer.choice, answer.index, answer.scores) == ("yes", 1, [0.1, 0.8, 0.8])


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (
            ScoreRequest,
            {"text_1": ["a", "b"], "text_2": ["c"]},
            "text_1 has 2 texts and text_2 has 1; send one text_1, or one for each text_2",
        ),
        (ScoreRequest, {"text_1": "a", "text_2": []}, "text_2=[]: List should have at least 1 item"),
        (ScoreRequest, {"text_1": "a"}, "text_2 is missing"),
        (ScoreRequest, {"text_1": "a", "text_2": [1]}, "text_2[0]=1: Input should be a valid string"),
        (
            ScoreRequest,
            {"text_1": "a", "text_2": ["b"] * 11},
            "the request has 11 pairs to score, this server's limit is 10 (serving.max_pairs); send fewer",
        ),
        (RerankRequest, {"query": "q" * 101, "documents": ["a"] * 10}, "the request's 10 pairs have 1,020 characters"),
        (ScoreRequest, {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 9}, "truncate_prompt_tokens=9 is not supported"),
        (RerankRequest, {"query": "q", "documents": [{"image": "b"}]}, 'documents[0]={"image": "b"}: Input should be a valid string'),
        (RerankRequest, {"query": "q", "documents": "a"}, 'documents="a": Input should be a valid list'),
        (RerankRequest, {"query": "q", "documents": ["a"], "top_n": -1}, "top_n=-1"),
        (ClassifyRequest, {"instruction": "q", "choices": ["a"]}, 'choices=["a"]: List should have at least 2 items'),
        (ClassifyRequest, {"instruction": "q", "choices": ["a", "b", "a"]}, 'choices contains "a" 2 times; send each choice once'),
    ],
)
def test_an_invalid_request_gives_the_field_its_value_and_the_correction(kind, body, message):
    with pytest.raises(ApiError) as caught:
        parse(kind, **body)
    assert message in str(caught.value) and caught.value.status == 400


def test_a_body_that_is_not_an_object_gives_the_required_fields():
    with pytest.raises(ApiError, match="send an object with `model` and `query` and `documents`"):
        scoring_api.parse_scoring_request(RerankRequest, b"[]", ServingConfig())


def test_a_score_that_is_not_finite_is_a_500_with_the_pair():
    request = parse(ClassifyRequest, instruction="q", choices=["a", "b"])
    with pytest.raises(ApiError, match="score of pair 1 is not a finite number") as caught:
        scoring_api.build_classification(request, scored(0.1, float("nan")), "1", 5)
    assert caught.value.status == 500


@pytest.mark.parametrize("first", ["text_1", "queries", "data_1"])
@pytest.mark.parametrize("second", ["text_2", "documents", "items", "data_2"])
def test_each_pair_of_names_is_taken_and_two_names_of_one_field_are_refused(first, second):
    assert parse(ScoreRequest, **{first: "a", second: ["b", "c"]}).pairs() == (["a", "a"], ["b", "c"])
    others = {"text_1", "queries", "data_1"} - {first}
    assert parse(ScoreRequest, **{first: "a", second: "b"}, **dict.fromkeys(others)).pairs() == (["a"], ["b"])
    for other in others:
        with pytest.raises(ApiError, match="are names of the same field; send one of them"):
            parse(ScoreRequest, **{first: "a", other: "a", second: "b"})


@pytest.mark.parametrize("limit", [0, 4096, 10_000, 3, None])
@pytest.mark.parametrize("name", ["max_tokens_per_doc", "max_tokens_per_query"])
def test_a_token_limit_that_cuts_nothing_is_taken(name, limit):
    length = 5000 if limit is None or limit == 0 or limit >= 4096 else limit
    body = json.dumps({"query": "q" * length, "documents": ["a" * length, "a"], name: limit}).encode()
    assert len(scoring_api.parse_scoring_request(RerankRequest, body, ServingConfig()).documents) == 2


@pytest.mark.parametrize("name", ["max_tokens_per_doc", "max_tokens_per_query"])
def test_a_token_limit_that_could_cut_a_text_is_refused(name):
    with pytest.raises(ApiError, match=f"{name}=2 is not supported, because it could cut a text") as caught:
        parse(RerankRequest, query="abc", documents=["abc"], **{name: 2})
    assert caught.value.param == name


@pytest.mark.parametrize("medium", ["image", "image_url", "audio", "content", "multi_modal"])
def test_a_document_with_a_medium_beside_its_text_is_refused(medium):
    with pytest.raises(ApiError, match=r"documents\[0\]="):
        parse(RerankRequest, query="q", documents=[{"text": "a", medium: "data:"}])


@pytest.mark.parametrize(("documents", "units"), [(1, 1), (100, 1), (101, 2), (1000, 10)])
def test_a_rerank_answer_has_the_usage_under_every_name_that_proxies_read(documents, units):
    body = json.dumps({"query": "q", "documents": ["a"] * documents}).encode()
    request = scoring_api.parse_scoring_request(RerankRequest, body, ServingConfig())
    answer = scoring_api.build_rerank_answer(request, scored(*[0.5] * documents), "1", version=2)
    assert answer.meta["billed_units"] == {"search_units": units}
    assert answer.meta["tokens"] == {"input_tokens": 7 * documents, "output_tokens": 0}
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7 * documents, 7 * documents)
