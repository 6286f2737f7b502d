"""Run two batch jobs on a Ray cluster: `cappy generate`, then scoring all responses of its set with Ray Data.

    python examples/batch_on_cluster.py              # starts a cluster of one node on this machine
    python examples/batch_on_cluster.py ADDRESS      # uses a running cluster: its dashboard, e.g. http://127.0.0.1:8265

It scores with the scorer of `examples/own_jsonl.py`; run that first. On a cluster of several machines, set the environment
variables CAPPY_WORKSPACE and CAPPY_SCORER to s3:// addresses, because the machines do not share this machine's disk.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import pandas as pd
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

import cappy
from cluster import ports

# Absolute paths: a job runs in another folder.
WORKSPACE = os.environ.get("CAPPY_WORKSPACE") or str(Path("runs/examples-cluster").absolute())
SCORER = os.environ.get("CAPPY_SCORER") or str(Path("runs/examples/scorer").absolute())


def main() -> None:
    """Run both jobs on the cluster at ADDRESS, else on a cluster that this process starts and stops."""
    with nullcontext(sys.argv[1]) if len(sys.argv) > 1 else one_node() as address:
        # The same as `cappy generate examples/tiny.yaml --set workspace=... --address ...`.
        made = cappy.generate("examples/tiny.yaml", settings={"workspace": WORKSPACE, "source.limit": 16}, address=address)
        print(f"set      {made['uri']}: {made['sources']['sampled']} sampled responses")

        # Any program can be a job: here this file, with the argument `score`. `env_vars` reach the job's process.
        client = JobSubmissionClient(address)
        environment = {"CAPPY_WORKSPACE": WORKSPACE, "CAPPY_SCORER": SCORER}
        files = {"working_dir": ".", "excludes": [".git", ".venv", "runs", "tests", "docs"]}
        job = client.submit_job(entrypoint="python examples/batch_on_cluster.py score", runtime_env={**files, "env_vars": environment})
        while not (status := client.get_job_status(job)).is_terminal():
            time.sleep(1)
        if status != JobStatus.SUCCEEDED:
            sys.exit(client.get_job_logs(job))
        scored = pd.read_parquet(f"{WORKSPACE}/scored")
        print(f"scored   {WORKSPACE}/scored: {len(scored)} pairs, mean score {scored['score'].mean():.3f}")


def score() -> None:
    """Score every pair of the set's train rows, with two scorer actors; write a Parquet folder."""
    rows = cappy.RegressionSet(f"{WORKSPACE}/dataset").to_ray("train")
    pairs = rows.flat_map(
        lambda row: [{"instruction": row["instruction"], "response": candidate["response"]} for candidate in row["candidates"]]
    )
    actors = ray.data.ActorPoolStrategy(size=2)
    scored = pairs.map_batches(ScoreBatch, fn_constructor_args=[SCORER], batch_size=64, batch_format="pandas", compute=actors, num_cpus=1)
    scored.write_parquet(f"{WORKSPACE}/scored", mode="overwrite")


class ScoreBatch:
    """Add a column `score` to a batch of pairs. Each actor builds one instance, so it loads the scorer once."""

    def __init__(self, scorer: str) -> None:
        self.scorer = cappy.Scorer.load(scorer)

    def __call__(self, batch: pd.DataFrame) -> pd.DataFrame:
        """Return the batch with its scores."""
        return batch.assign(score=self.scorer.score(list(batch["instruction"]), list(batch["response"])))


@contextmanager
def one_node() -> Iterator[str]:
    """Start a Ray cluster of one node and yield its dashboard's address. For several machines see `ray_cluster.yaml`."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the node listens on 127.0.0.1 only
    dashboard, folder, programs = ports.free_port(), tempfile.mkdtemp(prefix="ray-"), Path(sys.executable).parent
    command = [programs / "ray", "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--port={ports.free_port()}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={ports.free_port()}"]
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}  # jobs run `python` of this environment
    node = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not answers(f"http://127.0.0.1:{dashboard}/api/version"):
            if node.poll() is not None:
                sys.exit(f"the Ray node stopped during its start; see {folder}/session_latest/logs")
            time.sleep(1)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    """Return whether `url` answers with status 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    score() if sys.argv[1:] == ["score"] else main()
