"""Repositories on the Hugging Face hub: addresses, the files of one commit, and one-line errors.

An address is `hf://datasets/owner/name[@revision][/path]` or, for a model, `hf://owner/name[@revision][/path]`. `HF_ENDPOINT` selects
another server. The token comes from `HF_TOKEN` or from `hf auth login`. Only huggingface_hub reads it, and no error contains it.

Imports `huggingface_hub` inside functions, because its import takes time. Imports no code of a verb.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster import artifacts, models, storage
from cluster.errors import CappyError, UsageError, describe_disk_error, find_disk_error, first_line

_ADDRESS = re.compile(
    r"hf://(?P<datasets>datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[^/@]+|[^/@]+))?(?:/(?P<path>[^@]+))?"
)
# Words of the hub's own addresses that are not owners.
_NOT_OWNERS = ("datasets", "models", "spaces", "buckets", "kernels")
_TIMEOUT_S = 60
_LOGIN = "set HF_TOKEN to a token of an account with access, or run `hf auth login`"


@dataclass(frozen=True)
class Repository:
    """An address of a folder in a repository."""

    type: Literal["dataset", "model"]
    name: str
    """`owner/name`."""
    revision: str | None
    """A commit, tag or branch; None is the main branch."""
    path: str
    """The folder in the repository; empty for its root."""

    @property
    def uri(self) -> str:
        """The address as a text."""
        kind = "datasets/" if self.type == "dataset" else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{kind}{self.name}{revision}{f'/{self.path}' if self.path else ''}"

    @property
    def folder_name(self) -> str:
        """The last part of the address, without the revision."""
        return (self.path or self.name).rsplit("/", 1)[-1]

    def at(self, commit: str) -> Repository:
        """Return the same folder at one commit."""
        return replace(self, revision=commit)

    def place(self, name: str) -> str:
        """Return the path in the repository of a file of the folder."""
        return f"{self.path}/{name}" if self.path else name


def parse(uri: str, setting: str) -> Repository:
    """Return the repository of an address. Raises `UsageError`, which names `setting`, if it is not an address."""
    match = _ADDRESS.fullmatch(uri.rstrip("/"))
    if not match or match["name"].split("/")[0] in _NOT_OWNERS:
        raise UsageError(f"{setting}={uri} is not an address on the hub; write hf://datasets/owner/name or, for a scorer, hf://owner/name")
    if match["path"]:
        storage.check_relative_path(match["path"], f"{setting}={uri}")
    return Repository("dataset" if match["datasets"] else "model", match["name"], match["revision"], match["path"] or "")


def client() -> Any:
    """Return a client of the hub. It sends the token of the environment, if there is one."""
    from huggingface_hub import HfApi

    return HfApi(library_name="cappy-ray")


def refuse_pickles(files: Mapping[str, Any], setting: str) -> None:
    """Raise `CappyError` if a manifest lists a pickled file. Loading such a file can run code."""
    pickled = sorted(name for name in files if name.lower().endswith(models.PICKLED))
    if pickled:
        raise CappyError(f"{setting} has the pickled file {pickled[0]}, which can run code when it is loaded; save it as safetensors")


class Commit:
    """A folder of a repository at one commit: its manifest and the reads of its files."""

    def __init__(self, repository: Repository, setting: str) -> None:
        """Resolve the revision to a commit. Raises `CappyError` if the repository or the revision cannot be read."""
        self._setting = setting
        with one_line_errors(repository, setting):
            info = client().repo_info(repository.name, repo_type=repository.type, revision=repository.revision, timeout=_TIMEOUT_S)
        self.sha = str(info.sha)
        """The commit: 40 hex digits."""
        self.repository = repository.at(self.sha)
        self.uri = self.repository.uri

    def list_files(self) -> dict[str, str | None]:
        """Return the files of the folder, each with its SHA-256 in hex, or None if the hub does not have it."""
        from huggingface_hub.errors import RemoteEntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        where = self.repository
        start = len(where.place(""))
        try:
            with one_line_errors(where, self._setting, RemoteEntryNotFoundError):
                tree = client().list_repo_tree(where.name, where.path or None, recursive=True, revision=self.sha, repo_type=where.type)
                return {each.path[start:]: each.lfs.sha256 if each.lfs else None for each in tree if isinstance(each, RepoFile)}
        except RemoteEntryNotFoundError:
            return {}

    def read_manifest(self) -> artifacts.Manifest | None:
        """Return the manifest of the folder, or None without one. Raises `CappyError` if it is not a manifest."""
        with storage.temporary_folder("hub") as folder:
            try:
                file = self.download(artifacts.MANIFEST, folder)
            except FileNotFoundError:
                return None
            return artifacts.parse_any_manifest(file.read_bytes(), self.uri, self._setting)

    def download(self, name: str, folder: Path, moved: Callable[[int], None] = lambda count: None, *, again: bool = False) -> Path:
        """Download a file of the folder into a local folder and return its path. `moved` gets the bytes of each block.

        `again` ignores copies in the cache of huggingface_hub. Raises `FileNotFoundError` if the commit has no such file, `OSError` if
        the transfer broke off, and `CappyError` if the hub does not give the file.
        """
        from huggingface_hub.errors import RemoteEntryNotFoundError

        class Reporter(_Reporter):
            report = staticmethod(moved)

        where = self.repository
        try:
            with one_line_errors(where, self._setting, RemoteEntryNotFoundError):
                path = client().hf_hub_download(
                    where.name,
                    where.place(name),
                    repo_type=where.type,
                    revision=self.sha,
                    local_dir=folder,
                    force_download=again,
                    etag_timeout=_TIMEOUT_S,
                    tqdm_class=Reporter,
                )
        except RemoteEntryNotFoundError:
            raise FileNotFoundError(name) from None
        return Path(path)


class _Reporter:
    """The part of tqdm's interface that a download of huggingface_hub calls. It displays nothing."""

    report: Callable[[int], None]

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: float | None = 1) -> None:
        """Report the bytes of a block."""
        self.report(int(count or 0))

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None


@contextmanager
def quiet() -> Iterator[None]:
    """Turn the bars, warnings and log lines of huggingface_hub off inside the block: its lines can have signed URLs of files.

    The switch is one for the process, so use the block around the threads of a copy and not in each of them.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()


@contextmanager
def one_line_errors(repository: Repository, setting: str, *passed: type[Exception]) -> Iterator[None]:
    """Turn an error of huggingface_hub in the block into a `CappyError` of one line. Errors of the types `passed` stay."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (CappyError, *passed)):
            raise
        if full := find_disk_error(error):
            raise CappyError(describe_disk_error(full, str(full.filename or "the local folder"))) from None
        reason = describe_error(error, repository)
        if reason is None:
            raise
        raise CappyError(f"{setting}={repository.uri}: {_without_token(reason)}") from None


def describe_error(error: BaseException, repository: Repository) -> str | None:
    """Return a reason with the fix for an error of huggingface_hub; None for an error of another origin."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_chain(error))
    answer = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return "HF_HUB_OFFLINE=1 forbids requests to the hub; unset it"
    if answer is None:
        if any(isinstance(each, HTTPError | ConnectionError | TimeoutError) for each in chain):
            return f"{constants.ENDPOINT} cannot be reached; check the network and HF_ENDPOINT, then run the same command again to resume"
        if isinstance(error, HFValidationError):
            return f"{first_line(error)}; correct the address"
        of_library = isinstance(error, LocalEntryNotFoundError) or not isinstance(error, OSError)
        known = type(error).__module__.startswith(("huggingface_hub", "hf_xet")) or isinstance(error, ValueError | RuntimeError)
        return ": ".join(dict.fromkeys(first_line(each) for each in chain)) if of_library and known else None
    status = answer.response.status_code
    if isinstance(answer, RevisionNotFoundError):
        return f"the repository has no revision {repository.revision}; give a commit, tag or branch of it"
    if isinstance(answer, GatedRepoError):
        return f"access to the repository must be requested on its page; then {_LOGIN}"
    if isinstance(answer, RepositoryNotFoundError):
        return f"there is no such {repository.type} repository, or it is private; check the name, or {_LOGIN}"
    if status == 401:
        return f"the hub refuses the token; {_LOGIN}"
    if status == 403:
        return f"the token has no right to do this; {_LOGIN}"
    if status == 412:
        return "another push changed the repository meanwhile, so nothing was committed; run the same command again"
    if status == 429 or status >= 500:
        return f"the hub answered {status}; run the same command again later to resume"
    return f"the hub answered {status}: {answer.server_message or first_line(answer)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "<redacted>") if token else text
