"""The wheel: its contents, and a run of the installed package away from the checkout, from the shell, from Python and as a Ray job."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from cluster import ports

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cappy", "cluster", "evaluation", "generation", "serving", "training")
LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "runs", "dist", "build", "site", "*.egg-info", "__pycache__", ".*_cache")
# Few rows and short candidates: the real small models, once through.
SETTINGS = (
    "source={kind: bigbench, tasks: [tense], train_rows: 6, validation_rows: 4}",
    "sampler.decodings=[{name: greedy, temperature: 0, max_tokens: 4}, {name: sample, n: 2, max_tokens: 4}]",
    "generate.unit_rows=8",
    "adapt.pairs=32",
    "adapt.gate=false",
    "evaluation.resamples=100",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the checkout; the checkout itself stays without build folders."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(folder / "source")], check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_has_every_module_and_every_data_file_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        in_tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert in_tree <= names
        assert f"{package}/py.typed" in names
    assert {"serving/page.html", "cappy/configs/demo.yaml", "cappy/configs/schema.json", "evaluation/suites/bigbench.yaml"} <= names
    packaged = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cluster" / "packaged").rglob("*") if path.is_file()}
    assert {f"cluster/packaged/cappy-minilm/{name}" for name in ("delta.safetensors", "pack.json", "config.json", "README.md")} <= packaged
    assert packaged <= names and sum(zipfile.ZipFile(wheel).getinfo(name).file_size for name in packaged) <= 10_000_000
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Return the `bin` folder of a fresh environment with the wheel, beside the packages of the locked environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A path in a .pth file is added as it is: the .pth files inside, such as the checkout's editable install, are not read.
    (packages / "locked.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", "--ignore-installed", str(wheel)], check=True)
    return folder / "bin"


@pytest.fixture
def run(installed, tmp_path):
    """Return a function that runs a command of the fresh environment in another folder; its standard output."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS")}
    environment["PATH"] = f"{installed}:{environment['PATH']}"

    def command(name: str, *arguments: str) -> str:
        done = subprocess.run([str(installed / name), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return command


@pytest.mark.slow
def test_the_installed_package_is_the_wheel_and_not_the_checkout(run, installed):
    places = run("python", "-c", f"import {', '.join(PACKAGES)}; print(*({', '.join(f'{name}.__file__' for name in PACKAGES)}), sep='\\n')")
    assert all(line.startswith(str(installed.parent)) for line in places.split())


@pytest.mark.full
@pytest.mark.slow
def test_the_installed_commands_generate_adapt_and_evaluate_from_another_folder(run, tmp_path):
    assert "cappy-ray" in run("cappy", "--version")
    assert "workspace" in run("cappy", "config", "show", "demo")
    settings = [each for setting in (*SETTINGS, f"workspace={tmp_path / 'run'}") for each in ("--set", setting)]
    results = {
        verb: json.loads(run("cappy", verb, "demo", *settings, "--json").splitlines()[-1]) for verb in ("generate", "adapt", "evaluate")
    }
    assert results["generate"]["instructions"] == 10
    scorer = tmp_path / "run" / "adapted" / "tense"
    assert (scorer / "model.safetensors").exists()
    assert (tmp_path / "run" / "evaluation" / "report.html").exists()
    source = f"import cappy; scorer = cappy.Scorer.load({str(scorer)!r}); print(len(scorer.score(['a', 'b'], ['c', 'd'])))"
    assert run("python", "-c", source).split() == ["2"]


@pytest.mark.slow
def test_the_installed_package_serves_with_nothing_configured(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS")}
    port = ports.free_port()
    log = tmp_path / "serve.log"
    # The port alone is set, because another process may use the default.
    command = [str(installed / "cappy"), "serve", "--set", f"serving.port={port}"]
    with log.open("w") as stream:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=300).raise_for_status().json()
        assert answer["choices"][0]["message"]["content"].strip()
        pairs = {"text_1": "What is the capital of France?", "text_2": ["Paris", "Berlin"]}
        scores = httpx.post(f"http://127.0.0.1:{port}/v1/score", json=pairs, timeout=60).raise_for_status().json()
        assert [type(each["score"]) for each in scores["data"]] == [float, float]
        assert "using cappy-minilm, the scorer of the package" in log.read_text()
    finally:
        processes = [*psutil.Process(server.pid).children(recursive=True)] if server.poll() is None else []
        server.terminate()
        try:
            server.wait(60)
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            server.kill()


@pytest.mark.full
def test_a_verb_of_the_installed_package_runs_as_a_ray_job(run, installed, tmp_path):
    rows = [{"instruction": f"Is {n} even?", "references": ["yes"], "answer_choices": ["yes", "no"], "dataset": "even"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dashboard = ports.free_port()
    folder = tempfile.mkdtemp(prefix="ray-")  # short: the path of a socket has 107 characters at most
    arguments = ["start", "--head", "--block", f"--port={ports.free_port()}", f"--dashboard-port={dashboard}", "--num-cpus=4"]
    arguments += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={ports.free_port()}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS")}
    environment["PATH"] = f"{installed}:{environment['PATH']}"
    command = [str(installed / "python"), "-m", "ray.scripts.scripts", *arguments, f"--temp-dir={folder}"]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        while not answers(f"{address}/api/version"):
            assert head.poll() is None, (tmp_path / "head.log").read_text()[-3000:]
            time.sleep(0.5)
        # Classification rows need no LLM: nothing is sampled, and the job stays short.
        settings = [f"workspace={tmp_path / 'run'}", f"source={{kind: files, path: '{tmp_path}/rows.jsonl'}}"]
        output = run("cappy", "generate", "--address", address, *(each for setting in settings for each in ("--set", setting)), "--json")
        assert json.loads(output.splitlines()[-1])["instructions"] == 12
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
