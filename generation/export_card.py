"""Write the dataset card (README.md) of an export. Depends only on the manifest; imports no Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from cluster import folder_writer
from generation.dataset_card import canary_section, licence_text, markdown_table, size_category
from generation.export_formats import TABLE

LEFT_OUT = {
    "other_sources": "candidates of sources that the export does not use",
    "empty": "empty responses",
    "without_prompt": "candidates without a prompt",
    "without_value": "responses without a finite value",
    "repeated": "repeats of a response to the same prompt",
    "contradicting": "responses whose repeats have different values",
    "instructions_left_out": "instructions without a row of this format",
}
"""Description of each count of `left_out` in the summary."""
_TITLES = {
    "sft": "Supervised fine-tuning: prompts and completions",
    "dpo": "Preference pairs",
    "reward": "Preference pairs for a reward model",
    "kto": "Unpaired preferences",
    "chat": "Chats in OpenAI's fine-tuning format",
    "pairs": "Instructions and responses with labels",
    "ranking": "Lists of responses with scores",
}
_LOADERS = {
    "sft": "from trl import SFTTrainer\n\nSFTTrainer(model, train_dataset=rows)",
    "dpo": "from trl import DPOTrainer\n\nDPOTrainer(model, train_dataset=rows, processing_class=tokenizer)",
    "reward": "from trl import RewardTrainer\n\nRewardTrainer(model, train_dataset=rows)",
    "kto": "from trl import KTOTrainer\n\nKTOTrainer(model, train_dataset=rows, processing_class=tokenizer)",
    "chat": "rows[0]['messages']",
    "pairs": "from sentence_transformers import CrossEncoderTrainer\n\nCrossEncoderTrainer(model, train_dataset=rows, loss=loss)",
    "ranking": "from sentence_transformers import CrossEncoderTrainer\n\nCrossEncoderTrainer(model, train_dataset=rows, loss=loss)",
}


def write_card(uri: str, manifest: dict[str, Any], check: Callable[[], None] | None = None) -> dict[str, Any]:
    """Write `README.md` of an export; return its manifest with the file among its files. The caller publishes it."""
    entry = folder_writer.FolderWriter(uri, check).write_bytes("README.md", render_card(manifest).encode())
    return {**manifest, "files": manifest["files"] | {"README.md": entry}}


def render_card(manifest: Mapping[str, Any]) -> str:
    """Return the card of an export: Markdown with the YAML header of the Hugging Face hub."""
    summary, config = manifest["summary"], manifest["config"]
    form = summary["format"]
    license_ = config.get("generate", {}).get("license") or "unknown"
    suffix = "jsonl" if form == "chat" else "parquet"
    paths = {split: f"data/{split}/part-*.{suffix}" for split in summary["splits"]}
    header = {
        "license": license_,
        "task_categories": ["text-ranking" if form in ("pairs", "ranking", "reward") else "text-generation"],
        "size_categories": [size_category(summary["rows"])],
        "tags": ["cappy-ray", form],
        "configs": [{"config_name": "default", "data_files": [{"split": split, "path": path} for split, path in paths.items()]}],
    }
    described = TABLE[form].columns
    columns = markdown_table(
        ("column", "type", "description"), [(name, kind, described[name]) for name, kind in manifest["schema"].items()]
    )
    splits = markdown_table(("split", "rows"), [(split, f"{count:,}") for split, count in summary["splits"].items()])
    left_out = markdown_table(
        ("left out", "count"), [(LEFT_OUT[name], f"{count:,}") for name, count in summary["left_out"].items() if count]
    )
    by = f"`{summary['by']}`" if summary["by"] else "not ranked: the source has no scores"
    split = next(iter(paths))
    loader = "json" if form == "chat" else "parquet"
    source = config.get("source")
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---

# {_TITLES[form]}

{summary["rows"]:,} rows from {summary["instructions"]:,} instructions and {summary["candidates"]:,} candidates.

{splits}

## Load it

```python
import datasets

rows = datasets.load_dataset("{loader}", data_files="{summary["uri"]}/{paths[split]}", split="train")
{_LOADERS[form]}
```

## Columns

{columns}

## How it was made

- by `{manifest["command"]}`, code {manifest["code_version"]}, {manifest["created"]}
- source: `{summary["from"]}`
- values of the responses: {by}

{left_out if any(summary["left_out"].values()) else "Nothing was left out."}

`_MANIFEST.json` lists every file with its SHA-256; `cappy inspect` verifies them.

## Licence

{licence_text(license_)}
{canary_section(source) if source else ""}"""
