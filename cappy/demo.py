"""`make demo`: the pipeline `demo` on eight BIG-bench tasks, then one answer of a server; each step is a command.

Runs generate, adapt and evaluate as `cappy run demo`, shows their results, starts a server, sends it one question of the validation
rows, and stops it. Finished outputs are kept, so an interrupted demo resumes.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.rule import Rule

from cluster import ports, storage
from cluster.config import Config, load
from cluster.errors import CappyError
from generation.dataset import RegressionSet
from generation.prompts import messages
from serving import client
from training import adapted_index

CONFIG = "demo"
QUESTION_TASK = "linguistic_mappings"
SHOTS = 3
CANDIDATES = 8
_START_S = 300.0

out = Console(highlight=False, markup=False)


def main() -> int:
    """Run the demo; return the exit code of the first step that failed, else 0."""
    config = load(CONFIG)
    start = time.monotonic()
    commands = [["run", CONFIG], *(["inspect", uri, "--samples", "0"] for uri in (config.adapted_uri, config.evaluation_uri))]
    for number, command in enumerate(commands, 1):
        out.print(Rule(f"{number}/4  cappy {shlex.join(command)}", align="left"))
        if code := _cappy(*command):
            return code
        out.print(f"{(time.monotonic() - start) / 60:.1f} minutes so far", style="dim")
    out.print(Rule(f"4/4  cappy serve {CONFIG} --set serving.adapted=true", align="left"))
    try:
        _serve(config)
    except CappyError as error:
        out.print(f"error: {error}")
        return error.exit_code
    out.print(Rule(align="left"))
    out.print(f"report   {storage.absolute(config.evaluation_uri)}/report.html")
    out.print(f"scorers  {storage.absolute(config.adapted_uri)}")
    out.print(f"set      {storage.absolute(config.dataset_uri)}")
    out.print(f"done in {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


def _cappy(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "cappy.cli", *arguments]).returncode


def question(dataset: RegressionSet) -> tuple[list[Any], dict[str, Any]]:
    """Return the messages of a request (train rows as worked examples, then a validation row) and the validation row."""
    train = dataset.to_pandas("train")
    held_out = dataset.to_pandas("validation")
    row = held_out[held_out["dataset"] == QUESTION_TASK].iloc[0]
    same = train[(train["dataset"] == QUESTION_TASK) & (train["template"] == row["template"])].head(SHOTS)
    shots = [{"instruction": shot["instruction"], "response": shot["references"][0]} for _, shot in same.iterrows()]
    return messages(row["instruction"], shots), dict(row)  # type: ignore[arg-type]


def _model(config: Config) -> str:
    """Return the name of the served model with the scorer of the question's task; without an adapted scorer, the main model."""
    published = {each.task for each in adapted_index.read_published(config.adapted_uri, "serving.adapted")}
    name = config.serving.model_name
    return f"{name}+{QUESTION_TASK}" if QUESTION_TASK in published else name


def _serve(config: Config) -> None:
    turns, row = question(RegressionSet(config.dataset_uri))
    model = _model(config)
    port = ports.free_port(config.serving.host)
    url = f"http://{config.serving.host}:{port}"
    log = Path(config.workspace, "serve.log")
    with log.open("w") as sink:
        settings = (f"serving.port={port}", "serving.adapted=true")
        command = [sys.executable, "-m", "cappy.cli", "serve", CONFIG, *(word for each in settings for word in ("--set", each))]
        server = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            with out.status(f"starting {config.sampler.model} and the scorer behind {url}"):
                _wait_until_ready(url, server, log)
            out.print(client.curl_command(url, client.request_body(turns, CANDIDATES, model)))
            answer = client.ask(url, turns, CANDIDATES, model)
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
    out.print()
    out.print(f"question   {row['instruction'].strip()}")
    out.print(f"reference  {row['references'][0].strip()}")
    client.print_answer(answer, out)


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise CappyError(f"the server stopped during its start, see {log}: {log.read_text().strip().splitlines()[-1:]}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise CappyError(f"the server was not ready within {_START_S:g} s, see {log}")


if __name__ == "__main__":
    sys.exit(main())
