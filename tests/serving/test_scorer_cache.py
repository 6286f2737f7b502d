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
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def publish(encoder, uri, seed):
    """Publish the encoder with a head of its own, in the place of what was there; return the URI."""
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


def opened(uris, clock, room=2):
    further = {name: uri for name, uri in uris.items() if name != "main"}
    return ScorerCache("main", uris["main"], further, room=room, reload_s=10, dtype="float32", clock=clock)


def own(uri):
    return Scorer.load(uri, device="cpu").score(*PAIRS).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_all_scorers_are_loaded_in_the_arithmetic_asked_for(uris, dtype):
    shelf = ScorerCache("main", uris["main"], {"a": uris["a"]}, room=1, reload_s=10, dtype=dtype)
    for name in ("main", "a"):
        assert str((await shelf.get(name)).model.model.dtype) == f"torch.{dtype}"


async def score(shelf, name):
    return (await shelf.get(name)).model.score(*PAIRS).tolist()


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


async def test_scorers_are_loaded_when_asked_for_and_the_one_unused_for_longest_makes_room(uris, clock):
    shelf = opened(uris, clock)
    assert shelf.held == ["main"]
    first = await shelf.get("a")
    assert await score(shelf, "b") == own(uris["b"]) != own(uris["a"])
    assert await shelf.get("a") is first
    await shelf.get("c")
    assert shelf.held == ["main", "a", "c"]
    assert await shelf.get("a") is first and shelf.held == ["main", "c", "a"]
    assert await score(shelf, "b") == own(uris["b"]) and shelf.held == ["main", "a", "b"]
    assert await score(shelf, "main") == own(uris["main"])


async def test_those_who_wait_for_a_scorer_get_the_same_and_one_who_leaves_does_not_stop_its_loading(uris, clock):
    shelf = opened(uris, clock, room=1)
    gone = asyncio.ensure_future(shelf.get("a"))
    await asyncio.sleep(0)
    gone.cancel()
    held = await asyncio.gather(*(shelf.get("a") for _ in range(5)), shelf.get("b"))
    assert len({id(each) for each in held[:5]}) == 1 and len(shelf.held) == 2


@pytest.mark.parametrize("name", ["main", "a"])
async def test_what_is_published_anew_answers_from_the_first_look_on(encoder, uris, clock, name):
    shelf = opened(uris, clock)
    before = await shelf.get(name)
    publish(encoder, uris[name], seed=9)
    clock.now += 9.9
    assert await shelf.get(name) is before
    clock.now += 0.2
    after = await shelf.get(name)
    assert after.version != before.version and after.model.score(*PAIRS).tolist() == own(uris[name])
    clock.now += 11
    assert await shelf.get(name) is after


@pytest.mark.parametrize(("name", "fault"), [("main", "half"), ("a", "truncated"), ("main", "other weights"), ("a", "not json")])
async def test_a_broken_publication_leaves_the_old_scorer_in_service_with_one_warning(encoder, uris, clock, caplog, name, fault):
    shelf, uri = opened(uris, clock), uris[name]
    before = await shelf.get(name)
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
        assert await shelf.get(name) is before
    (said,) = warnings(caplog)
    assert f"scorer {name!r} cannot be loaded" in said and "the one loaded before goes on answering" in said
    publish(encoder, uri, seed=10)
    clock.now += 11
    assert await score(shelf, name) == own(uri)


async def test_a_scorer_that_cannot_be_loaded_is_no_matter_of_the_others_and_answers_once_it_is_there(encoder, uris, clock, caplog):
    shutil.rmtree(uris["b"])
    shelf = opened(uris, clock, room=1)
    first = await shelf.get("a")
    for _ in range(3):
        with pytest.raises(ScorerUnavailable, match="the scorer 'b' cannot be loaded") as caught:
            await shelf.get("b")
        assert uris["b"] not in str(caught.value)
    assert await shelf.get("a") is first
    (said,) = warnings(caplog)
    assert uris["b"] in said and "requests for it are answered 503" in said
    publish(encoder, uris["b"], seed=2)
    with pytest.raises(ScorerUnavailable):  # the failure is remembered until the next look
        await shelf.get("b")
    clock.now += 11
    assert await score(shelf, "b") == own(uris["b"])
    with pytest.raises(CappyError, match="scorer_path"):
        ScorerCache("main", str(uris["b"]) + "/nothing", {}, room=1, reload_s=10, dtype="float32")


async def test_a_store_that_hangs_holds_up_only_the_scorer_it_keeps(uris, clock, monkeypatch):
    monkeypatch.setattr(scorer_cache, "_PATIENCE_S", 0.05)
    some = opened(uris, clock)
    before = await some.get("a")
    manifests = [Path(uris[name], "_MANIFEST.json") for name in ("a", "c")]
    for manifest in manifests:  # a pipe nobody writes to: who reads it waits
        manifest.unlink()
        os.mkfifo(manifest)
    clock.now += 11
    waiting = asyncio.ensure_future(some.get("c"))
    assert await some.get("a") is before and await some.get("a") is before
    assert await score(some, "b") == own(uris["b"]) and await score(some, "main") == own(uris["main"])
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
    scores = await score(opened({**uris, "lora": uri}, clock), "lora")
    np.testing.assert_allclose(scores, base.score(*PAIRS), atol=1e-6)
    assert not np.allclose(scores, own(uris["main"]), atol=1e-5)


async def test_requests_at_once_that_fill_many_batches_get_the_scores_they_get_alone(uris, clock):
    """Real scorers, two of them, in several threads, each request long enough for several batches."""
    shelf = opened(uris, clock)
    sizes, calls = (90, 3, 70, 1), []

    def counted(held, instructions, responses, threads):
        calls.append(len(responses))
        return score_pairs(held, instructions, responses, threads)

    batcher = ScoreBatcher(counted, 4)
    asked = [
        (name, [f"say after me {number} " * 12] * size) for number, (name, size) in enumerate(zip(("main", "a") * 2, sizes, strict=True))
    ]
    responses = [[f"a red fox {place}" for place in range(len(instructions))] for _, instructions in asked]
    held = {name: await shelf.get(name) for name in ("main", "a")}
    answers = await asyncio.gather(
        *(batcher.score(held[name], instructions, mine) for (name, instructions), mine in zip(asked, responses, strict=True))
    )
    assert sum(calls) == sum(sizes) and len(calls) > 4
    for (name, instructions), mine, scored in zip(asked, responses, answers, strict=True):
        alone = held[name].model.score(instructions, mine)
        np.testing.assert_allclose(scored["scores"], alone, atol=1e-6)
        assert scored["version"] == held[name].version and len(scored["tokens"]) == len(mine)
        assert "logprob_weight" not in scored
