"""Start `cappy serve` or vLLM's OpenAI server for benchmarks, and measure memory and CPU time of their processes.

Both servers have the same LLM: the same functions give its weights and the engine's arguments. Environment variables differ.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import httpx
import psutil

from cluster import models, ports
from cluster.config import Config, ScorerConfig, TrainingConfig, VLLMConfig, load
from cluster.errors import CappyError
from generation.engines.contract import has_gpu
from generation.engines.vllm import engine_arguments, set_environment

MIB = 1 << 20
# From a part of a process's title or command line to its role; the first match counts.
_ROLES = {
    "ServeReplica:cappy:Gateway": "gateway",
    "ServeReplica:cappy:LLM": "llm",
    "ServeReplica:cappy:Scorer": "scorer",
    "ProxyActor": "proxy",
    "ServeController": "controller",
    "VLLM::": "engine",
    "multiprocessing.spawn": "engine",  # an engine without a title
    "cappy.cli": "driver",
    "api_server": "server",
}
_START_S = 300.0


class Server:
    """A running server: its URL and its processes."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self._root = psutil.Process(pid)

    @property
    def chat(self) -> str:
        return f"{self.url}/v1/chat/completions"

    def family(self) -> dict[int, tuple[str, psutil.Process]]:
        """Return role and process of each process of the server, by process id; processes without a role have `rest`."""
        found = {}
        for process in (self._root, *self._root.children(recursive=True)):
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                found[process.pid] = (next((role for part, role in _ROLES.items() if part in words), "rest"), process)
        return found

    def of(self, role: str) -> list[psutil.Process]:
        """Return the processes of a role, oldest first."""
        return sorted((process for name, process in self.family().values() if name == role), key=lambda each: each.create_time())

    def memory(self) -> dict[str, float]:
        """Return the resident memory of each role, summed over its processes, in MiB."""
        return self._sum(lambda process: process.memory_info().rss / MIB)

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of each role so far, without processes that have ended."""
        return self._sum(lambda process: sum(process.cpu_times()[:2]))

    def _sum(self, figure) -> dict[str, float]:  # type: ignore[no-untyped-def]
        sums: dict[str, float] = {}
        for role, process in self.family().values():
            with suppress(psutil.Error):
                sums[role] = sums.get(role, 0.0) + figure(process)
        return sums


class MemorySampler:
    """Measure a server's memory every `every_s` seconds inside the block: `samples` has (seconds since start, MiB by role)."""

    def __init__(self, server: Server, every_s: float = 5.0) -> None:
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._server, self._every, self._over = server, every_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.samples.append((time.monotonic() - self._start, self._server.memory()))
            self._over.wait(self._every)


def write_scorer(folder: Path, seed: int) -> None:
    """Write a MiniLM scorer with a random head, which is as fast as a trained scorer."""
    from training.scorer import Scorer, load_tokenizer, new_model

    encoder = models.resolve("minilm-l6", "encoder")
    model = new_model(encoder, ScorerConfig(), TrainingConfig(), seed)
    Scorer(model, load_tokenizer(encoder, "minilm-l6", "encoder"), 512).save(folder)


@contextmanager
def ours(config: Config, folder: Path) -> Iterator[Server]:
    """Run `cappy serve` with a config at a free port, with its files and log in `folder`."""
    port = ports.free_port()
    path = folder / "serve.yaml"
    path.write_text(config.model_copy(update={"serving": config.serving.model_copy(update={"port": port})}).to_yaml())
    # `serving_kills` joins this Ray without a token. By default Ray's workers have a lower priority, unlike vLLM's server.
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    with _running(["-m", "cappy.cli", "serve", str(path)], port, folder / "serve.log", environment) as server:
        yield server


@contextmanager
def vllms(config: Config, folder: Path, settings: Literal["ours", "own"] = "ours") -> Iterator[Server]:
    """Run vLLM's OpenAI server at a free port with the LLM of a config.

    Args:
        settings: `ours` gives the engine the settings of `cappy serve`; `own` gives it the defaults of `vllm serve`, with all cores.
    """
    port = ports.free_port()
    path = folder / "vllm.yaml"
    path.write_text(config.to_yaml())
    with _running(["-m", "benchmarks.servers", str(path), str(port), settings], port, folder / "vllm.log", {}) as server:
        yield server


@contextmanager
def _running(command: list[str], port: int, log: Path, environment: dict[str, str]) -> Iterator[Server]:
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=sink, stderr=sink, env={**os.environ, **environment}, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", process.pid)
    try:
        try:
            wait_healthy(server, process)
        except CappyError as error:
            raise CappyError(f"{error}: {log.read_text()[-2000:]}") from None
        yield server
    finally:
        family = [each for _, each in server.family().values()] if process.poll() is None else []
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        _, left = psutil.wait_procs(family, timeout=10)
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def wait_healthy(server: Server, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until the server's `/health` answers 200. Raises `CappyError` after 300 s, or if `process` ends."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        with suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=10).status_code == 200:
                return
        time.sleep(0.5)
    raise CappyError(f"{server.url} did not become healthy")


def _become_vllm(config: Config, port: str, settings: str) -> None:
    """Replace this process with vLLM's OpenAI server."""
    engine = config.sampler.engine
    assert isinstance(engine, VLLMConfig)
    set_environment(engine, has_gpu())
    # vLLM's defaults for waiting threads and processes: with the machine to itself they are the fastest.
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        os.environ.pop(name, None)
    folder = models.resolve(config.sampler.model, "sampler.model")
    # As `cappy serve`: no sampling defaults from the model's folder, and no log line per request.
    flags = ["--host", "127.0.0.1", "--port", port, "--served-model-name", config.serving.model_name]
    flags += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    arguments = engine_arguments(folder, engine, has_gpu()) if settings == "ours" else {"model": str(folder)}
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags])


if __name__ == "__main__":
    _become_vllm(load(sys.argv[1]), *sys.argv[2:])
