"""Fine-tune an LLM on its own responses that the scorer selected; compare greedy decoding of other rows before and after.

    python -m benchmarks.round_trip --json -
    python -m benchmarks.round_trip --workspace runs/round_trip --steps 60 --train-rows 64 --rows 24 --json -

`cappy answer` samples the train rows of the demo without their references, with three worked examples of each task, and the scorer of the
package selects. `cappy export --as sft --threshold` writes the selected responses, without the worked examples. LoRA trains SmolLM2 on
them for a few steps and saves the adapter as safetensors. As control, the same LoRA trains on a random candidate of each exported row.
Then the model without adapter (`before`), with the adapter (`selected`) and with that of the control (`random`) decodes the validation
rows greedily, without worked examples. Figures are Rouge-L of the first line in points, averaged over tasks, with paired intervals.

With `--workspace` an interrupted run resumes: finished answers, exports, adapters and decoded rows are kept.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.answer_quality import hide_references, points_and_gains, read_answers
from cluster import artifacts, models, storage
from cluster.config import Config, load
from cluster.errors import UsageError
from cluster.progress import Bar, log
from generation import labels
from generation.export import ExportOptions, run_export
from generation.sources.reader import read_rows
from generation.sources.row import Instruction
from serving.answer import run_answer

Pair = tuple[str, str]
"""A prompt and its completion."""

_MAX_TOKENS = 512
"""Largest length of a training example and of a prompt, in tokens."""
_IGNORED = -100
"""The label of a token without loss, as in transformers."""
_DECODED = "decoded.json"


def split_rows(rows: Sequence[Instruction], train_rows: int, validation_rows: int) -> tuple[list[dict[str, Any]], list[Instruction]]:
    """Return the lines for `cappy answer`, and the rows to decode; both have up to this many rows of each task.

    Raises `UsageError` if an instruction is in both.
    """
    lines, _ = hide_references([row for row in rows if row.split == "train"], train_rows)
    counts: dict[str, int] = {}
    decoded = []
    for row in rows:
        if row.split == "validation" and counts.setdefault(row.dataset, 0) < validation_rows:
            counts[row.dataset] += 1
            decoded.append(row)
    trained = {line["instruction"] for line in lines}
    if shared := [row.instruction for row in decoded if row.instruction in trained]:
        raise UsageError(f"source: {len(shared)} train and validation rows have the same instruction, e.g. {shared[0][:80]!r}; remove them")
    return lines, decoded


def random_pairs(pairs: Sequence[Pair], answers: Sequence[Mapping[str, Any]], seed: int) -> list[Pair]:
    """Return the prompts with a random non-empty candidate each. A draw depends only on `seed` and the prompt."""
    pools = {row["instruction"]: [each["response"] for each in row["candidates"] if each["response"]] for row in answers}
    return [(prompt, random.Random(f"{seed} {prompt}").choice(pools[prompt])) for prompt, _ in pairs]


def encode_pair(tokenizer: Any, pair: Pair) -> tuple[list[int], list[int]]:
    """Return the token ids and the labels of a training example: the loss is on the completion and the end of the turn.

    A prompt that is too long loses its start, so that the completion is complete.
    """
    prompt = encode_prompt(tokenizer, pair[0])
    completion = tokenizer(pair[1] + tokenizer.eos_token, add_special_tokens=False)["input_ids"][:_MAX_TOKENS]
    prompt = prompt[max(0, len(prompt) + len(completion) - _MAX_TOKENS) :]
    return [*prompt, *completion], [*[_IGNORED] * len(prompt), *completion]


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a prompt as one turn of a chat."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[-_MAX_TOKENS:]


def draw_batches(count: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Return the examples of each step: epochs of random order, cut into batches; a batch can end one epoch and start the next."""
    draw, order = random.Random(seed), list[int]()
    while len(order) < steps * batch_size:
        order += draw.sample(range(count), count)
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]


def load_model(name: str) -> tuple[Any, Any]:
    """Return the model in float32, on a GPU if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.resolve(name, "sampler.model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def fine_tune(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    rank: int,
    seed: int,
) -> list[float]:
    """Train LoRA adapters on all linear layers of the blocks and save them in a folder; return the loss of each step.

    The adapters stay in `model`. The learning rate falls linearly to 0. The folder has peft's `adapter_model.safetensors`.
    """
    import peft
    import torch

    from training.lora import linear_layers

    torch.manual_seed(seed)
    options = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules=linear_layers(model))
    adapted = peft.get_peft_model(model, options)
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=learning_rate, weight_decay=0.0)
    examples = [encode_pair(tokenizer, pair) for pair in pairs]
    losses: list[float] = []
    adapted.train()
    with Bar("fine-tuning", steps, "steps") as bar:
        for step, batch in enumerate(draw_batches(len(examples), steps, batch_size, seed)):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            longest = max(len(examples[index][0]) for index in batch)
            ids_BT = torch.full((len(batch), longest), tokenizer.pad_token_id)
            labels_BT, mask_BT = torch.full_like(ids_BT, _IGNORED), torch.zeros_like(ids_BT)
            for row, index in enumerate(batch):
                ids, own = (torch.tensor(each) for each in examples[index])
                ids_BT[row, : len(ids)], labels_BT[row, : len(ids)], mask_BT[row, : len(ids)] = ids, own, 1
            loss = adapted(
                input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), labels=labels_BT.to(model.device)
            ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.advance(note=f"loss {losses[-1]:.3f}")
    adapted.eval()
    adapted.save_pretrained(folder, safe_serialization=True)
    return losses


def decode_greedily(model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, batch_size: int = 16) -> list[str]:
    """Return the first line of the greedy continuation of each prompt, at most `max_tokens` tokens."""
    import torch

    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    texts = [""] * len(encoded)
    with torch.inference_mode(), Bar("decoding", len(encoded), "rows") as bar:
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            longest = len(encoded[batch[-1]])
            # Padded on the left, so that every prompt ends where its continuation starts.
            ids_BT = torch.tensor([[tokenizer.pad_token_id] * (longest - len(encoded[index])) + encoded[index] for index in batch])
            mask_BT = torch.tensor([[0] * (longest - len(encoded[index])) + [1] * len(encoded[index]) for index in batch])
            drawn_BT = model.generate(
                input_ids=ids_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            for index, text in zip(batch, tokenizer.batch_decode(drawn_BT[:, longest:], skip_special_tokens=True), strict=True):
                texts[index] = first_line(text)
            bar.advance(len(batch))
    return texts


def first_line(text: str) -> str:
    """Return the first line that is not blank, without leading and trailing white space."""
    return text.strip().partition("\n")[0].strip()


def compare(decoded: Mapping[str, Sequence[str]], rows: Sequence[Instruction], config: Config) -> dict[str, Any]:
    """Return the points of each arm, the gains over `before` and of `selected` over `random`, with intervals."""
    values = {}
    for arm, texts in decoded.items():
        found = labels.compute_labels(
            pa.array([[text] for text in texts]),
            pa.array([list(row.references) for row in rows]),
            config.generate.label,
            [row.instruction for row in rows],
        )
        values[arm] = np.asarray(found, np.float64).tolist()
    compared = {"selected": ["before", "random"], "random": ["before"]}
    points, gains = points_and_gains(values, [row.dataset for row in rows], compared, config.seed)
    return {"rows": len(rows), "tasks": len({row.dataset for row in rows}), "points": points, "gains": gains}


def read_pairs(uri: str) -> list[Pair]:
    """Return the rows of an export in the form `sft`, sorted."""
    manifest = artifacts.read_manifest(uri, "export", "export")
    found: list[Pair] = []
    for name in manifest["files"]:
        if name.endswith(".parquet"):
            fs, path = storage.filesystem(storage.join(uri, name))
            found += [(row["prompt"], row["completion"]) for row in pq.read_table(path, filesystem=fs).to_pylist()]
    return sorted(found)


def _arm(arm: str, pairs: Sequence[Pair], rows: Sequence[Instruction], workspace: Path, config: Config, options: Any) -> dict[str, Any]:
    """Fine-tune on the pairs, if there are any, and decode the rows; return the texts and losses. Those of an earlier run are kept."""
    folder = workspace / arm
    given = {name: getattr(options, name) for name in ("steps", "batch_size", "learning_rate", "rank")} if pairs else {}
    asked = {**given, "pairs": [list(pair) for pair in pairs], "prompts": [row.instruction for row in rows]}
    if (folder / _DECODED).exists():
        stored: dict[str, Any] = json.loads((folder / _DECODED).read_text(encoding="utf-8"))
        if stored["asked"] == asked:
            log(f"{arm}: the decoded rows in {folder} are kept")
            return stored
    log(f"{arm}: {len(pairs)} train rows" if pairs else f"{arm}: the model without adapters")
    model, tokenizer = load_model(config.sampler.model)
    losses = fine_tune(model, tokenizer, pairs, folder, **given, seed=config.seed) if pairs else []
    limit = max(decoding.max_tokens for decoding in config.sampler.decodings)
    texts = decode_greedily(model, tokenizer, [row.instruction for row in rows], limit)
    done = {"asked": asked, "losses": losses, "texts": texts}
    storage.write_bytes(str(folder / _DECODED), json.dumps(done, ensure_ascii=False).encode())
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="demo", help="the config with the source, the LLM and the decodings")
    parser.add_argument("--train-rows", type=int, default=48, help="train rows of each task")
    parser.add_argument("--rows", type=int, default=24, help="rows of each task to decode")
    parser.add_argument("--threshold", type=float, default=0.3, help="smallest score of an exported response")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--workspace", help="folder of the answers, exports and adapters; default: a temporary folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a setting of the run")
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    base = load(options.config, options.settings)
    rows = [row for row in read_rows(base.source, base.seed) if isinstance(row, Instruction)]
    lines, decoded_rows = split_rows(rows, options.train_rows, options.rows)
    with ExitStack() as stack:
        workspace = Path(options.workspace or stack.enter_context(TemporaryDirectory(prefix="cappy-benchmark-"))).absolute()
        prompts = str(workspace / "prompts.jsonl")
        storage.write_bytes(prompts, "".join(json.dumps(line) + "\n" for line in lines).encode())
        own = {
            "workspace": str(workspace),
            "source": {"kind": "files", "path": prompts, "validation_fraction": 0},
            "answer.keep_candidates": True,
        }
        config = load(load(options.config, own), options.settings)
        if not storage.exists(storage.join(config.answers_uri, artifacts.MANIFEST)):
            run_answer(config)
        sft = str(workspace / "sft")
        exported = run_export(config.answers_uri, sft, ExportOptions("sft", threshold=options.threshold), overwrite=True)
        selected = read_pairs(sft)
        arms = {"before": [], "selected": selected, "random": random_pairs(selected, read_answers(config.answers_uri), config.seed)}
        done = {arm: _arm(arm, pairs, decoded_rows, workspace, config, options) for arm, pairs in arms.items()}
        result = compare({arm: each["texts"] for arm, each in done.items()}, decoded_rows, config)
    different = sum(ours != theirs for ours, theirs in zip(arms["selected"], arms["random"], strict=True))
    result |= {"answers": len(lines), "exported": exported["rows"], "different_responses": different, "steps": options.steps}
    result["losses"] = {arm: [round(each["losses"][0], 3), round(each["losses"][-1], 3)] for arm, each in done.items() if each["losses"]}
    print(
        f"{result['exported']} of {result['answers']} train rows exported, {different} with another response in the control; "
        f"{result['rows']} decoded rows of {result['tasks']} tasks; Rouge-L in points"
    )
    for arm, points in result["points"].items():
        gains = result["gains"].get(arm, {})
        against = "".join(f"   over {name} {each['mean']:+.1f} [{each['low']:+.1f}, {each['high']:+.1f}]" for name, each in gains.items())
        print(f"{arm:10} {points:6.1f}{against}")
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
