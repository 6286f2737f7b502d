import shutil

import huggingface_hub.constants
import pytest
from transformers import AutoModelForSequenceClassification, BertConfig

from cluster import artifacts, cache_eviction, models, storage
from cluster.errors import CappyError, UsageError
from tests.faults import KeyStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=30, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return path


def test_the_embedded_encoder_loads():
    from transformers import AutoModel, AutoTokenizer

    path = models.resolve("minilm-l6", "scorer.encoder")
    assert AutoModel.from_pretrained(path).config.hidden_size == 384
    assert AutoTokenizer.from_pretrained(path)("hello world")["input_ids"] == [101, 7592, 2088, 102]


@pytest.mark.slow
def test_the_embedded_llm_loads_and_answers_a_question():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = models.resolve("smollm2-135m-instruct", "sampler.model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    turns = [{"role": "user", "content": "Where is the Eiffel Tower? Answer with the city."}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = AutoModelForCausalLM.from_pretrained(path).generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_a_local_folder_is_used_directly(folder):
    assert models.resolve(str(folder), "scorer.encoder") == folder


def test_an_s3_folder_is_copied_again_after_a_change(folder, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path))
    storage.upload_folder(folder, f"{bucket}/model")
    first = models.resolve(f"{bucket}/model", "scorer.encoder")
    assert (first / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert models.resolve(f"{bucket}/model", "scorer.encoder") == first
    storage.write_bytes(f"{bucket}/model/extra.json", b"{}")
    assert models.resolve(f"{bucket}/model", "scorer.encoder") != first


@pytest.mark.parametrize("published", [False, True])
def test_a_file_that_changed_but_kept_its_size_is_copied_again(published, folder, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path))
    files = storage.upload_folder(folder, f"{bucket}/model")
    if published:
        artifacts.publish(f"{bucket}/model", {"kind": "scorer", "files": files})
    first = models.resolve(f"{bucket}/model", "scorer.encoder")
    changed = bytearray((folder / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    storage.write_bytes(f"{bucket}/model/model.safetensors", bytes(changed))
    second = models.resolve(f"{bucket}/model", "scorer.encoder")
    assert (second / "model.safetensors").read_bytes() == changed and second != first


def test_a_folder_that_changes_during_the_copy_is_not_kept(folder, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path))
    storage.upload_folder(folder, f"{bucket}/model")
    real = storage.download_file

    def download(uri, file):
        digest = real(uri, file)
        storage.write_bytes(f"{bucket}/model/config.json", b"{}")
        return digest

    monkeypatch.setattr(storage, "download_file", download)
    with pytest.raises(CappyError, match=rf"scorer.encoder={bucket}/model: its files changed during the copy to the cache; run"):
        models.resolve(f"{bucket}/model", "scorer.encoder")
    assert not any((tmp_path / "models" / "s3").glob("[!.]*"))


def test_pickled_weights_in_object_storage_are_not_copied(folder, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path))
    storage.upload_folder(folder, f"{bucket}/model")
    for name in ("pytorch_model.bin", "optimizer.pt", "deep/x.PKL"):
        storage.write_bytes(f"{bucket}/model/{name}", b"a pickle")
    copied = models.resolve(f"{bucket}/model", "sampler.model")
    assert set(storage.list_files(str(copied))) == set(storage.list_files(str(folder)))
    storage.write_bytes(f"{bucket}/pickled/config.json", b"{}")
    storage.write_bytes(f"{bucket}/pickled/pytorch_model.bin", b"a pickle")
    with pytest.raises(CappyError, match=r"no \*.safetensors weights \(pickled .bin files are not loaded\)"):
        models.resolve(f"{bucket}/pickled", "sampler.model")


def test_the_copies_of_models_stay_within_the_limit_of_the_cache(folder, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path))
    monkeypatch.setattr(cache_eviction, "_used", {})
    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setenv("CAPPY_CACHE_LIMIT_GB", str(1.5 * size / 1e9))
    storage.upload_folder(folder, f"{bucket}/model")
    first = models.resolve(f"{bucket}/model", "scorer.encoder")
    storage.write_bytes(f"{bucket}/model/extra.json", b"{}")
    second = models.resolve(f"{bucket}/model", "scorer.encoder")
    assert second.exists() and not first.exists()
    storage.upload_folder(folder, f"{bucket}/other")
    models.resolve(f"{bucket}/other", "scorer.encoder")
    assert second.exists()  # it is in use


@pytest.mark.parametrize("call", [models.resolve, models.check_model])
def test_a_folder_without_weights_is_refused(call, folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CappyError, match=r"scorer.encoder=.*no \*.safetensors weights \(pickled .bin files are not loaded\)"):
        call(str(tmp_path), "scorer.encoder")


@pytest.mark.parametrize("call", [models.resolve, models.check_model])
@pytest.mark.parametrize("name", ["/no/such/folder", "./nor/this"])
def test_a_missing_path_is_refused(call, name):
    with pytest.raises(UsageError, match="no such folder; give a folder with model weights, a hub name or one of smollm2-135m-instruct"):
        call(name, "sampler.model")


def test_the_error_for_an_unreachable_hub_name_lists_the_alternatives():
    with pytest.raises(CappyError, match=r"sampler.model=nobody/nothing: the hub .*; give a local folder"):
        models.resolve("nobody/nothing", "sampler.model")


@pytest.mark.parametrize("key", ["m//absolute", "m/../../x", "m/a\\b"])
@pytest.mark.parametrize("setting", ["sampler.model", "scorer_path", "scorer.encoder"])
def test_a_model_whose_keys_lead_out_of_the_cache_is_refused(key, setting, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path / "cache"))
    key = key.replace("/absolute", f"{tmp_path}/outside")
    with KeyStore({key.replace("//", "/"): b"theirs", "m/config.json": b"{}", "m/model.safetensors": b"", key: b"theirs"}) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        with pytest.raises(CappyError, match=rf"{setting}=s3://bucket/m names the file .* not within the folder") as caught:
            models.resolve("s3://bucket/m", setting)
    assert repr(key.removeprefix("m/")) in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub cache with two commits of `org/model`, used offline: branch `main`, and the older one under tag `v1` and `refs/pr/1`."""
    model = tmp_path / "models--org--model"
    for commit, names in (("b" * 40, ["main"]), ("a" * 40, ["v1", "refs/pr/1"])):
        shutil.copytree(folder, model / "snapshots" / commit)
        for name in names:
            (model / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
            (model / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("name", "commit"),
    [("org/model", "b"), ("org/model@main", "b"), ("org/model@v1", "a"), ("org/model@refs/pr/1", "a"), (f"org/model@{'a' * 40}", "a")],
)
def test_a_hub_name_can_have_a_revision(hub, name, commit):
    models.check_model(name, "scorer.encoder")
    assert models.resolve(name, "scorer.encoder").name == commit * 40


@pytest.mark.parametrize(("name", "message"), [("org/model@", "no revision after the @"), ("org/model@v9", "org/model@v9: the hub cannot")])
def test_a_revision_that_does_not_exist_is_refused(hub, name, message):
    with pytest.raises(CappyError, match=message):
        models.resolve(name, "scorer.encoder")


def test_a_local_folder_may_have_an_at_sign(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "model@v1")
    assert models.resolve(str(path), "scorer.encoder") == path
    assert models.split_revision(str(path)) == (str(path), None)
    assert models.split_revision("org/model@v1") == ("org/model", "v1")
