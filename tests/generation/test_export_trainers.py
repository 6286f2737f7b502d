"""Each export is loaded by the library it is for: TRL and sentence-transformers train two steps on it.

The libraries need a separate environment: `CAPPY_TRAINERS_PYTHON` is its Python; see CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import TypeAdapter

from generation.export import ExportOptions, run_export
from tests.generation.made_set import publish

PYTHON = os.environ.get("CAPPY_TRAINERS_PYTHON")
STEPS = Path(__file__).parent / "trainers" / "steps.py"


@pytest.mark.full
@pytest.mark.skipif(PYTHON is None, reason="CAPPY_TRAINERS_PYTHON is not set: the trainers have a separate environment")
@pytest.mark.parametrize(
    ("form", "options", "columns"),
    [
        ("sft", {}, ["prompt", "completion"]),
        ("sft", {"messages": True, "system": "Be brief."}, ["prompt", "completion"]),
        ("dpo", {"per_instruction": 2}, ["prompt", "chosen", "rejected", "margin"]),
        ("dpo", {"messages": True}, ["prompt", "chosen", "rejected", "margin"]),
        ("reward", {}, ["prompt", "chosen", "rejected", "margin"]),
        ("kto", {}, ["prompt", "completion", "label"]),
        ("kto", {"messages": True}, ["prompt", "completion", "label"]),
        ("chat", {}, ["messages"]),
        ("pairs", {}, ["instruction", "response", "label"]),
        ("ranking", {}, ["query", "documents", "scores"]),
    ],
)
def test_a_trainer_takes_two_steps_on_an_export(form, options, columns, tmp_path):
    assert PYTHON is not None
    publish(f"{tmp_path}/set")
    run_export(f"{tmp_path}/set", f"{tmp_path}/out", ExportOptions(form, **options))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [PYTHON, str(STEPS), form, f"{tmp_path}/out", f"{tmp_path}/models"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["columns"] == columns and result["steps"] == 2
    assert len(result["losses"]) == 2 and all(math.isfinite(loss) for loss in result["losses"])


def test_chats_are_valid_messages_of_the_openai_library(tmp_path):
    publish(f"{tmp_path}/set")
    run_export(f"{tmp_path}/set", f"{tmp_path}/out", ExportOptions("chat", system="Be brief."))
    lines = (tmp_path / "out/data/train/part-00000.jsonl").read_bytes().splitlines()
    adapter = TypeAdapter(list[ChatCompletionMessageParam])
    for line in lines:
        chat = json.loads(line)
        assert list(chat) == ["messages"] and len(adapter.validate_python(chat["messages"])) == 3
        assert chat["messages"][-1]["role"] == "assistant"
    assert len(lines) == 10
