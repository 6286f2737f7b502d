import asyncio
import shutil

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from cluster import models
from cluster.config import DecodingConfig, Seq2SeqConfig
from cluster.errors import CappyError
from generation.engines.contract import PromptTooLong
from generation.engines.seq2seq import Seq2SeqEngine, choose_tokens
from generation.prompts import messages
from tests.generation.engines.conftest import WORDS, write_tokenizer

TEXTS = ["say after me", "a red fox", "the", "please say the green owl now please", "a blue cat say", "me me me me me me bee"]
GREEDY = DecodingConfig(name="greedy", temperature=0, max_tokens=12)
WARM = DecodingConfig(name="warm", n=4, min_tokens=2, max_tokens=12)


def engine(folder, kind=Seq2SeqEngine, **settings):
    return kind(str(folder), Seq2SeqConfig(**{"kind": "transformers", "dtype": "float32", "max_prompt_tokens": 64, **settings}))


def draw(llm, texts, *decodings, seed=7):
    """Return the candidates of each text for each decoding, from concurrent calls; without `seed` they are random."""

    async def collect():
        prompts = [llm.encode(messages(text), "raw", 16) for text in texts]
        return await asyncio.gather(
            *(
                llm.sample(prompt, decoding, None if seed is None else seed + number, f"{number}")
                for number, prompt in enumerate(prompts)
                for decoding in decodings
            )
        )

    return asyncio.run(collect())


def reference(folder, text, **options):
    """Return the texts of transformers' `generate`, without n-gram bans and beams of the checkpoint's generation config."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prefix = [model.generation_config.decoder_start_token_id]
    prefix += [0] if model.generation_config.forced_bos_token_id == 0 else []
    model.generation_config.update(no_repeat_ngram_size=0, forced_bos_token_id=None, num_beams=1)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    written = model.generate(ids, decoder_input_ids=torch.tensor([prefix]), do_sample=False, **options)[:, len(prefix) :]
    return tokenizer.batch_decode(written, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("decoding", "options"),
    [
        (GREEDY, {"max_new_tokens": 12}),
        (DecodingConfig(name="b", temperature=0, beams=4, max_tokens=12), {"num_beams": 4, "max_new_tokens": 12}),
        (
            DecodingConfig(name="b", n=3, temperature=0, beams=4, min_tokens=3, max_tokens=9),
            {"num_beams": 4, "num_return_sequences": 3, "min_new_tokens": 3, "max_new_tokens": 9},
        ),
    ],
)
def test_greedy_and_beam_candidates_equal_those_of_transformers_generate(seq2seq, decoding, options):
    pools = draw(engine(seq2seq), TEXTS, decoding)
    for text, pool in zip(TEXTS, pools, strict=True):
        assert [candidate["response"] for candidate in pool] == reference(seq2seq, text, **options)


@pytest.mark.parametrize("decoding", [GREEDY, WARM, DecodingConfig(name="b", n=3, temperature=0, beams=4, max_tokens=12)])
def test_logprobs_equal_those_of_a_forward_step_with_the_whole_candidate(seq2seq, decoding, monkeypatch):
    llm = engine(seq2seq)
    drawn = []
    monkeypatch.setattr(
        Seq2SeqEngine, "_candidate", lambda self, ids, *rest, own=Seq2SeqEngine._candidate: drawn.append(ids) or own(self, ids, *rest)
    )
    (pool,) = draw(llm, ["a red fox say"], decoding)
    ids = torch.tensor([llm.encode(messages("a red fox say"), "raw", 16)])
    for candidate, tokens in zip(pool, drawn, strict=True):
        tokens = torch.tensor([tokens[: candidate["tokens"]]])
        inputs = torch.cat([torch.tensor([llm.prefix]), tokens[:, :-1]], dim=1)
        logprobs = llm.model(input_ids=ids, decoder_input_ids=inputs).logits[:, len(llm.prefix) - 1 :].log_softmax(-1)
        assert candidate["logprob"] == pytest.approx(logprobs.gather(2, tokens[:, :, None]).sum().item(), abs=1e-4)


def test_candidates_do_not_depend_on_the_other_requests_in_the_batch(seq2seq):
    together = draw(engine(seq2seq), TEXTS, GREEDY, WARM)
    crowded = draw(engine(seq2seq, batch_tokens=16), TEXTS, GREEDY, WARM)
    for number, text in enumerate(TEXTS):
        alone = draw(engine(seq2seq), [text], GREEDY, WARM, seed=7 + number)
        for one, other in zip(alone, together[2 * number : 2 * number + 2], strict=True):
            assert [each["response"] for each in one] == [each["response"] for each in other]
            assert [each["logprob"] for each in one] == pytest.approx([each["logprob"] for each in other], abs=1e-4)
    assert [[each["response"] for each in pool] for pool in crowded] == [[each["response"] for each in pool] for pool in together]


def test_seeds_and_draws_give_different_candidates_and_equal_seeds_equal_ones(seq2seq):
    llm = engine(seq2seq)
    first, second = draw(llm, ["a fox"], WARM, seed=1)[0], draw(llm, ["a fox"], WARM, seed=2)[0]
    assert len({each["response"] for each in [*first, *second]}) > 4
    assert [each["response"] for each in first] == [each["response"] for each in draw(llm, ["a fox"], WARM, seed=1)[0]]
    chance = [draw(llm, ["a fox"], WARM, seed=None)[0] for _ in range(2)]
    assert [each["response"] for each in chance[0]] != [each["response"] for each in chance[1]]


def test_a_smaller_n_draws_the_first_candidates_of_a_larger_n(seq2seq):
    llm = engine(seq2seq)
    (two,), (four,) = draw(llm, ["a fox"], WARM.model_copy(update={"n": 2})), draw(llm, ["a fox"], WARM)
    assert [each["response"] for each in two] == [each["response"] for each in four][:2]


def test_min_tokens_max_tokens_and_finish_reasons(seq2seq):
    llm = engine(seq2seq)
    pools = draw(llm, TEXTS, DecodingConfig(name="w", n=16, min_tokens=3, max_tokens=6))
    candidates = [each for pool in pools for each in pool]
    assert {each["finish_reason"] for each in candidates} == {"stop", "length"}
    # The end-of-text token counts, and comes after at least min_tokens other tokens.
    assert all(4 <= each["tokens"] <= 6 if each["finish_reason"] == "stop" else each["tokens"] == 6 for each in candidates)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_stop_string_ends_a_candidate_and_is_not_part_of_it(seq2seq, beams):
    llm = engine(seq2seq)
    decoding = DecodingConfig(name="g", temperature=0, beams=beams, max_tokens=12)
    wholes = [pool[0] for pool in draw(llm, TEXTS, decoding)]
    text, whole = next((text, whole) for text, whole in zip(TEXTS, wholes, strict=True) if len(set(whole["response"].split())) > 1)
    words = whole["response"].split()
    second = next(word for word in words if word != words[0])
    (cut,) = draw(llm, [text], decoding.model_copy(update={"stop": (second,)}))[0]
    assert cut["response"] == whole["response"].split(second)[0].strip()
    assert cut["finish_reason"] == "stop" and words.index(second) + 1 <= cut["tokens"] < whole["tokens"]
    assert 0 > cut["logprob"] > whole["logprob"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ],
)
def test_tokens_follow_the_distribution_after_temperature_top_k_and_top_p(settings, expected):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(10_000, 4)
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(choose_tokens(logits, DecodingConfig(name="x", **settings), uniform), minlength=4)
    assert (counts[[1, 3, 2, 0]] / 10_000).tolist() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_top_p_of_a_large_vocabulary_keeps_the_smallest_set_of_tokens(scale):
    """A flat distribution needs half of the 3,000 tokens for half its mass, a steep one a few dozen."""
    torch.manual_seed(0)
    probabilities = (scale * torch.randn(3000)).softmax(-1)
    uniform = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    drawn = choose_tokens(probabilities.log().expand(2000, 3000), DecodingConfig(name="x", top_p=0.5), uniform)
    ordered, tokens = probabilities.sort(descending=True)
    kept = tokens[: int((ordered.cumsum(0) < 0.4999).sum()) + 1]
    # Rounding may add or remove one token.
    assert set(drawn.tolist()) <= set(kept.tolist()) | {tokens[len(kept)].item()}
    assert len(kept) == pytest.approx(1500, abs=1) if scale == 0 else len(kept) < 100
    assert len(set(drawn.tolist())) >= 0.9 * len(kept)


def test_a_batch_that_is_too_large_for_the_memory_is_split(seq2seq):
    sizes = []

    class Small(Seq2SeqEngine):
        def _sample_batch(self, batch):
            sizes.append(len(batch))
            if len(batch) > 2:
                raise torch.OutOfMemoryError("no memory")
            return super()._sample_batch(batch)

    small = engine(seq2seq, Small)
    texts = [[pool[0]["response"] for pool in draw(llm, TEXTS, GREEDY)] for llm in (small, engine(seq2seq))]
    assert texts[0] == texts[1]
    assert sizes[0] == len(TEXTS) and sum(size for size in sizes if size <= 2) == len(TEXTS)


def test_invalid_prompts_and_settings_raise_errors_of_one_line(seq2seq):
    llm = engine(seq2seq, max_prompt_tokens=16)
    with pytest.raises(PromptTooLong, match=r"the prompt has 31 tokens, above max_prompt_tokens=16; shorten"):
        llm.encode(messages("a " * 30), "raw", 16)
    with pytest.raises(CappyError, match=r"sampler\.prompt\.form=chat: the model has no chat template; set sampler\.prompt\.form=raw"):
        llm.encode(messages("a"), "chat", 16)
    shots = [{"instruction": "say a red fox", "response": "a red fox"}] * 3
    assert len(llm.encode(messages("say the blue owl", shots), "raw", 16)) == 4 + 7 + 1
    if seq2seq.name.startswith("bart"):
        message = r"max_prompt_tokens=512 is above the 128 positions of sampler\.model=.*; set it to 128 or less"
        with pytest.raises(CappyError, match=message):
            engine(seq2seq, max_prompt_tokens=512)


def test_a_decoder_only_model_is_rejected_with_the_engine_kind_to_use():
    models.resolve("smollm2-135m-instruct", "sampler.model")
    with pytest.raises(
        CappyError, match=r"sampler\.model=smollm2-135m-instruct is a llama and not an encoder-decoder; set sampler\.engine\.kind=vllm"
    ):
        engine("smollm2-135m-instruct")


def test_pickled_weights_beside_other_safetensors_are_not_loaded(seq2seq, tmp_path):
    folder = shutil.copytree(seq2seq, tmp_path / "decoy")
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    torch.save(AutoModelForSeq2SeqLM.from_pretrained(seq2seq).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CappyError, match=r"sampler\.model=.*decoy cannot be loaded: .*model\.safetensors") as caught:
        engine(folder)
    assert "\n" not in str(caught.value)


def test_a_damaged_weight_file_is_one_line(seq2seq, tmp_path):
    folder = shutil.copytree(seq2seq, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(CappyError, match=r"sampler\.model=.*damaged cannot be loaded: ") as caught:
        engine(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoding", [GREEDY, DecodingConfig(name="b", temperature=0, beams=2, max_tokens=4)])
def test_a_log_probability_that_is_not_finite_is_null(seq2seq, decoding):
    llm = engine(seq2seq)
    next(llm.model.decoder.parameters() if hasattr(llm.model, "decoder") else llm.model.model.decoder.parameters()).data.fill_(torch.nan)
    ((candidate,),) = draw(llm, ["a red fox"], decoding)
    assert candidate["logprob"] is None and candidate["tokens"] > 0


@pytest.mark.parametrize("keep", [False, True])
def test_reasoning_is_removed_unless_the_config_keeps_it(seq2seq, tmp_path, keep):
    folder = shutil.copytree(seq2seq, tmp_path / "thinker")
    plain = draw(engine(folder), ["a red fox"], GREEDY)[0][0]["response"]
    write_tokenizer(folder, [f"<think>hm</think>{word}" for word in WORDS])
    config = Seq2SeqConfig(kind="transformers", dtype="float32", max_prompt_tokens=64)
    llm = Seq2SeqEngine(str(folder), config, keep_reasoning=keep)
    ids = engine(seq2seq).encode(messages("a red fox"), "raw", 16)
    (candidate,) = asyncio.run(llm.sample(ids, GREEDY, 7, "0"))
    assert plain and candidate["response"] == ("<think>hm</think>" + plain.replace(" ", " <think>hm</think>") if keep else plain)
