"""Loading, eviction and reloading of scorers, with real small scorers on disk and a clock that the tests set."""

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from cluster import artifacts, storage
from cluster.config import LoraConfig, ScorerConfig, TrainingConfig
from cluster.errors import CappyError
from serving import scorer_cache
from serving.deployments import score_pairs
from serving.score_batcher import ScoreBatcher
from serving.scorer_cache import ScorerCache, ScorerUnavailable
from tests.training import conftest
from training import lora
from training.scorer import Scorer, load_tokenizer, new_model

encoder = conftest.encoder
PAIRS = (["say after me red fox"] * 3, ["a red fox", "the white me", "a cow"])


class Clock:
    """A clock that stays at `now`."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def publish(encoder, uri, seed):
    """Publish a scorer with a head from `seed`, instead of the scorer at `uri`; return the URI."""
    storage.delete(f"{uri}/{artifacts.MANIFEST}")
    storage.delete(uri)
    with tempfile.TemporaryDirectory() as folder:
        model = new_model(encoder, ScorerConfig(max_length=32), TrainingConfig(), seed)
        Scorer(model, load_tokenizer(encoder, "x", "s"), 32).save(folder)
        artifacts.publish(uri, {"kind": "scorer", "files": storage.upload_folder(Path(folder), uri)})
    return uri


@pytest.fixture
def uris(encoder, tmp_path):
    return {name: publish(encoder, str(tmp_path / name), seed) for seed, name in enumerate(("main", "a", "b", "c"))}


@pytest.fixture
def clock():
    return Clock()


def open_cache(uris, clock, capacity=2):
    further = {name: uri for name, uri in uris.items() if name != "main"}
    return ScorerCache("main", uris["main"], further, capacity=capacity, reload_s=10, dtype="float32", clock=clock)


def expected_scores(uri):
    return Scorer.load(uri, device="cpu").score(*PAIRS).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_every_scorer_is_loaded_in_the_configured_dtype(uris, dtype):
    cache = ScorerCache("main", uris["main"], {"a": uris["a"]}, capacity=1, reload_s=10, dtype=dtype)
    for name in ("main", "a"):
        assert str((await cache.get(name)).model.model.dtype) == f"torch.{dtype}"


async def score(cache, name):
    return (await cache.get(name)).model.score(*PAIRS).tolist()


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


async def test_scorers_are_loaded_at_the_first_request_and_the_least_recently_used_one_is_evicted(uris, clock):
    cache = open_cache(uris, clock)
    assert cache.loaded_names == ["main"]
    first = await cache.get("a")
    assert await score(cache, "b") == expected_scores(uris["b"]) != expected_scores(uris["a"])
    assert await cache.get("a") is first
    await cache.get("c")
    assert cache.loaded_names == ["main", "a", "c"]
    assert await cache.get("a") is first and cache.loaded_names == ["main", "c", "a"]
    assert await score(cache, "b") == expected_scores(uris["b"]) and cache.loaded_names == ["main", "a", "b"]
    assert await score(cache, "main") == expected_scores(uris["main"])


async def test_concurrent_requests_share_one_load_and_a_cancelled_request_does_not_stop_it(uris, clock):
    cache = open_cache(uris, clock, capacity=1)
    cancelled = asyncio.ensure_future(cache.get("a"))
    await asyncio.sleep(0)
    cancelled.cancel()
    loaded = await asyncio.gather(*(cache.get("a") for _ in range(5)), cache.get("b"))
    assert len({id(each) for each in loaded[:5]}) == 1 and len(cache.loaded_names) == 2


@pytest.mark.parametrize("name", ["main", "a"])
async def test_a_new_version_is_used_after_the_first_check_that_finds_it(encoder, uris, clock, name):
    cache = open_cache(uris, clock)
    before = await cache.get(name)
    publish(encoder, uris[name], seed=9)
    clock.now += 9.9
    assert await cache.get(name) is before
    clock.now += 0.2
    after = await cache.get(name)
    assert after.version != before.version and after.model.score(*PAIRS).tolist() == expected_scores(uris[name])
    clock.now += 11
    assert await cache.get(name) is after


@pytest.mark.parametrize(("name", "fault"), [("main", "half"), ("a", "truncated"), ("main", "other weights"), ("a", "not json")])
async def test_a_broken_publication_leaves_the_old_scorer_in_service_with_one_warning(encoder, uris, clock, caplog, name, fault):
    cache, uri = open_cache(uris, clock), uris[name]
    before = await cache.get(name)
    publish(encoder, uri, seed=9)
    if fault == "half":
        storage.delete(f"{uri}/_MANIFEST.json")
    elif fault == "not json":
        storage.write_bytes(f"{uri}/_MANIFEST.json", b"{")
    else:
        weights = f"{uri}/model.safetensors"
        data = storage.read_bytes(weights)
        storage.write_bytes(weights, data[:1000] if fault == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    for _ in range(3):
        clock.now += 11
        assert await cache.get(name) is before
    (warning,) = warnings(caplog)
    assert f"scorer {name!r} cannot be loaded" in warning and "the version loaded before stays in use" in warning
    publish(encoder, uri, seed=10)
    clock.now += 11
    assert await score(cache, name) == expected_scores(uri)


async def test_a_scorer_that_cannot_be_loaded_does_not_affect_the_others_and_loads_once_it_is_published(encoder, uris, clock, caplog):
    shutil.rmtree(uris["b"])
    cache = open_cache(uris, clock, capacity=1)
    first = await cache.get("a")
    for _ in range(3):
        with pytest.raises(ScorerUnavailable, match="the scorer 'b' cannot be loaded") as caught:
            await cache.get("b")
        assert uris["b"] not in str(caught.value)
    assert await cache.get("a") is first
    (warning,) = warnings(caplog)
    assert uris["b"] in warning and "requests for it get status 503" in warning
    publish(encoder, uris["b"], seed=2)
    with pytest.raises(ScorerUnavailable):  # no new attempt before the next check is due
        await cache.get("b")
    clock.now += 11
    assert await score(cache, "b") == expected_scores(uris["b"])
    with pytest.raises(CappyError, match="scorer_path"):
        ScorerCache("main", str(uris["b"]) + "/nothing", {}, capacity=1, reload_s=10, dtype="float32")


async def test_a_store_that_does_not_answer_delays_only_requests_for_its_scorer(uris, clock, monkeypatch):
    monkeypatch.setattr(scorer_cache, "_RELOAD_WAIT_S", 0.05)
    some = open_cache(uris, clock)
    before = await some.get("a")
    manifests = [Path(uris[name], "_MANIFEST.json") for name in ("a", "c")]
    for manifest in manifests:  # a read of a pipe without a writer blocks
        manifest.unlink()
        os.mkfifo(manifest)
    clock.now += 11
    waiting = asyncio.ensure_future(some.get("c"))
    assert await some.get("a") is before and await some.get("a") is before
    assert await score(some, "b") == expected_scores(uris["b"]) and await score(some, "main") == expected_scores(uris["main"])
    assert not waiting.done()
    pipes = [os.open(manifest, os.O_WRONLY) for manifest in manifests]
    for manifest, pipe in zip(manifests, pipes, strict=True):
        manifest.unlink()
        os.close(pipe)
    with pytest.raises(ScorerUnavailable):
        await waiting


async def test_adapters_are_merged_into_their_base(encoder, uris, clock, tmp_path):
    uri = str(tmp_path / "adapters")
    model = AutoModelForSequenceClassification.from_pretrained(uris["main"])
    base = Scorer(model, load_tokenizer(Path(uris["main"]), "x", "s"), 32)
    wrapped = lora.add_adapters(base.model, LoraConfig(rank=2), seed=5)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1
    lora.save_adapters(
        wrapped, {"uri": uris["main"], "sha256": lora.weights_sha256(tmp_path / "main"), "writer": None}, tmp_path / "adapters"
    )
    artifacts.publish(uri, {"kind": "scorer", "files": artifacts.checksums(uri, storage.list_files(uri))})
    scores = await score(open_cache({**uris, "lora": uri}, clock), "lora")
    np.testing.assert_allclose(scores, base.score(*PAIRS), atol=1e-6)
    assert not np.allclose(scores, expected_scores(uris["main"]), atol=1e-5)


async def test_concurrent_requests_in_many_batches_get_the_scores_of_single_requests(uris, clock):
    """Two real scorers in several threads; the long requests fill several batches."""
    cache = open_cache(uris, clock)
    sizes, calls = (90, 3, 70, 1), []

    def counted(scorer, instructions, responses, threads):
        calls.append(len(responses))
        return score_pairs(scorer, instructions, responses, threads)

    batcher = ScoreBatcher(counted, 4)
    requests = [
        (name, [f"say after me {number} " * 12] * size) for number, (name, size) in enumerate(zip(("main", "a") * 2, sizes, strict=True))
    ]
    responses = [[f"a red fox {index}" for index in range(len(instructions))] for _, instructions in requests]
    loaded = {name: await cache.get(name) for name in ("main", "a")}
    answers = await asyncio.gather(
        *(batcher.score(loaded[name], instructions, mine) for (name, instructions), mine in zip(requests, responses, strict=True))
    )
    assert sum(calls) == sum(sizes) and len(calls) > 4
    for (name, instructions), mine, scored in zip(requests, responses, answers, strict=True):
        alone = loaded[name].model.score(instructions, mine)
        np.testing.assert_allclose(scored["scores"], alone, atol=1e-6)
        assert scored["version"] == loaded[name].version and len(scored["tokens"]) == len(mine)
        assert "logprob_weight" not in scored
