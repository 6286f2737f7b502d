"""Run a pipeline with a synthetic LLM, as a process that kills itself at a step: FILE STEP middle|end [KEY=VALUE | --redo=STEP ...]."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from cappy import jobs, pipeline
from cappy.pipeline_file import read_pipeline
from cappy.pipeline_verbs import Step
from cluster import storage
from cluster.errors import CappyError
from tests.generation.fixed_llm import FixedLLM

MARKS = {"generate": "_staging/units/", "train": "_checkpoints/", "answer": "_staging/sampled/"}
"""Files that a step writes in the middle of its work. The other steps write in other folders."""


def run_step(step: Step, overwrite: bool) -> dict[str, Any]:
    """Run a step, with `FixedLLM` as its LLM."""
    if step.verb in ("generate", "answer"):
        return jobs.load_verb(step.verb)(step.config, overwrite=overwrite, load=FixedLLM)
    return pipeline.run_step(step, overwrite)


def kill() -> None:
    """End this process and its children with SIGKILL."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _kill_when_begun(step: Step) -> None:
    mark = MARKS.get(step.verb, "")
    while not any(name.startswith(mark) and "_lease/" not in name for name in _list(step.uri)):
        time.sleep(0.02)
    kill()


def _list(uri: str) -> list[str]:
    return list(storage.list_files(uri)) if storage.exists(uri) else []


def main(file: str, victim: str, moment: str, *changes: str) -> int:
    """Run the pipeline; return the exit code."""

    def run(step: Step, overwrite: bool) -> dict[str, Any]:
        if step.name == victim and moment == "middle":
            threading.Thread(target=_kill_when_begun, args=(step,), daemon=True).start()
        result = run_step(step, overwrite)
        if step.name == victim:
            kill()
        return result

    redo = [each.removeprefix("--redo=") for each in changes if each.startswith("--redo=")]
    settings = [each for each in changes if not each.startswith("--redo=")]
    try:
        pipeline.run_pipeline(read_pipeline(file, settings), redo=redo, run=run)
    except CappyError as error:
        print(error, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
