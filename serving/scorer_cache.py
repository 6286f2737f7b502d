"""Cache of loaded scorers: the main scorer always, additional scorers from their first request, each reloaded when republished.

Loading takes seconds, so it runs in worker threads, once for all requests that wait for the scorer. A load delays only requests for
that scorer, and a scorer that cannot be loaded fails only its own requests. Imports no Ray; imports torch only when a scorer is loaded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster import artifacts, models, storage
from cluster.config import ScorerConfig
from cluster.errors import CappyError

if TYPE_CHECKING:
    from training.scorer import Dtype, Scorer
    from training.selection import Selection

logger = logging.getLogger("ray.serve")
# The request that starts a check for a new version waits for it this long. After that the loaded version answers the request.
_RELOAD_WAIT_S = 2.0
_THREADS = 4
# While transformers loads a model, it replaces functions of torch for the whole process.
_load_lock = threading.Lock()


class ScorerUnavailable(CappyError):
    """A configured scorer cannot be loaded; the log has the reason."""


@dataclass(frozen=True)
class LoadedScorer:
    """A scorer in memory."""

    model: Scorer
    version: str | None
    """12 hex digits of the manifest's SHA-256. None for a model without a manifest, which is assumed never to change."""
    logprob_weight: float | None
    """See `Scorer.logprob_weight`."""
    selection: Selection | None = None
    """See `Scorer.selection`."""


@dataclass
class _Entry:
    """The state of one scorer."""

    uri: str
    setting: str
    loaded: LoadedScorer | None = None
    checked_at: float = float("-inf")
    """Time of the last check for a new version, in seconds of the cache's clock."""
    reload: asyncio.Future[LoadedScorer | None] | None = None
    """The check or load that is running."""
    logged_error: str | None = None
    """The last error in the log, so that a lasting error is logged once."""


class ScorerCache:
    """Scorers by name. `main` is loaded in the constructor and stays loaded.

    Args:
        main: name of the main scorer.
        main_uri: location of the main scorer.
        additional: locations of the additional scorers, by name.
        capacity: maximum number of additional scorers in memory; the least recently used one is evicted.
        reload_s: interval between checks for a new version of a scorer in use, in seconds; also the interval between load attempts.
        dtype: see `Scorer.load`.
        scorer: kernels and format of the scorers; None is the default.
        clock: returns the time in seconds.

    Raises `CappyError` if the main scorer cannot be loaded.
    """

    def __init__(
        self,
        main: str,
        main_uri: str,
        additional: Mapping[str, str],
        *,
        capacity: int,
        reload_s: float,
        dtype: Dtype,
        scorer: ScorerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.main, self._capacity, self._reload_s, self._clock = main, capacity, reload_s, clock
        self._dtype, self._scorer = dtype, scorer
        self._entries = {name: _Entry(uri, f"scorer {name!r}: path") for name, uri in additional.items()}
        self._entries[main] = _Entry(main_uri, "scorer_path", load_if_changed(main_uri, "scorer_path", None, dtype, scorer), clock())
        self._recently_used: OrderedDict[str, None] = OrderedDict()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="scorers")

    @property
    def loaded_names(self) -> list[str]:
        """The names of the scorers in memory: the main scorer, then the others, least recently used first."""
        return [self.main, *self._recently_used]

    async def get(self, name: str) -> LoadedScorer:
        """Return a scorer; load it, or check it for a new version, if that is due. Cancelling the call does not stop the load.

        Raises `ScorerUnavailable` if the scorer cannot be loaded; the next attempt is made after `reload_s`. Raises `KeyError` for a
        name that is not configured.
        """
        entry = self._entries[name]
        due = entry.reload is None and self._clock() - entry.checked_at >= self._reload_s
        if due:
            entry.checked_at = self._clock()
            entry.reload = asyncio.ensure_future(self._reload(name, entry))
        loaded = entry.loaded
        if entry.reload is not None and loaded is None:
            loaded = await asyncio.shield(entry.reload)
        elif entry.reload is not None and due:
            await asyncio.wait({entry.reload}, timeout=_RELOAD_WAIT_S)
            loaded = entry.loaded or loaded
        if loaded is None:
            raise ScorerUnavailable(f"the scorer {name!r} cannot be loaded")
        if name in self._recently_used:
            self._recently_used.move_to_end(name)
        return loaded

    async def _reload(self, name: str, entry: _Entry) -> LoadedScorer | None:
        """Load the published version if it differs from the loaded one; return the scorer that is loaded after that."""
        before = entry.loaded
        try:
            loaded = await asyncio.get_running_loop().run_in_executor(
                self._threads, load_if_changed, entry.uri, entry.setting, before, self._dtype, self._scorer
            )
        except Exception as error:  # a fault of one scorer, of any kind, must not stop the server
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, CappyError) else str(error)
            if reason != entry.logged_error:
                effect = "the version loaded before stays in use" if before else "requests for it get status 503"
                logger.warning("scorer %r cannot be loaded (%s): %s", name, reason, effect)
            entry.logged_error = reason
            return before
        finally:
            entry.reload = None
        if loaded is not before:
            logger.info("scorer %r: loaded version %s", name, loaded.version)
        entry.loaded, entry.logged_error = loaded, None
        if name != self.main:
            self._mark_used(name)
        return loaded

    def _mark_used(self, name: str) -> None:
        """Make a scorer the most recently used; evict the least recently used ones above the capacity."""
        self._recently_used[name] = None
        self._recently_used.move_to_end(name)
        while len(self._recently_used) > self._capacity:
            evicted = self._entries[self._recently_used.popitem(last=False)[0]]
            evicted.loaded, evicted.checked_at = None, float("-inf")


def load_if_changed(uri: str, setting: str, loaded: LoadedScorer | None, dtype: Dtype, scorer: ScorerConfig | None = None) -> LoadedScorer:
    """Return `loaded` if it is the version published at `uri`, else load the published version with the kernels and format of `scorer`.

    Raises `CappyError`, with `setting` in the message, if `uri` holds no scorer, is no longer published, or changes during the load.
    """
    from training.scorer import Scorer

    version = read_version(uri)
    if loaded is not None and version == loaded.version:
        return loaded
    if loaded is not None and version is None:
        raise CappyError(f"{setting}={uri} no longer has a {artifacts.MANIFEST}: it was withdrawn, or a new version is being published")
    if version is not None:
        _verify_weights(uri, setting)
    with _load_lock:
        settings = scorer or ScorerConfig()
        model = Scorer.load(uri, dtype, setting=setting, cpu_kernels=settings.cpu_kernels, format=settings.format)
    if read_version(uri) != version:
        raise CappyError(f"{setting}={uri} changed while it was loaded: a new version was published, or it was withdrawn")
    return LoadedScorer(model, version, model.logprob_weight, model.selection)


def read_version(uri: str) -> str | None:
    """Return 12 hex digits of the SHA-256 of the manifest at `uri`, which differs for each publication; None without a manifest."""
    try:
        return hashlib.sha256(storage.read_bytes(storage.join(uri, artifacts.MANIFEST))).hexdigest()[:12]
    except (FileNotFoundError, NotADirectoryError):
        return None


def _verify_weights(uri: str, setting: str) -> None:
    """Raise `CappyError` if the weights differ from the manifest's checksums: other copy tools write the files in any order."""
    files = artifacts.read_any_manifest(uri, setting)["files"]
    weights = {name: entry for name, entry in files.items() if name.endswith(".safetensors")}
    folder = models.resolve(uri, setting, adapters=True)
    if problems := artifacts.verify(str(folder), {"files": weights}):
        if storage.is_s3(uri):
            storage.delete(str(folder))  # the cached copy: it would not be downloaded again for the same manifest
        raise CappyError(f"{setting}={uri}: {problems[0]}; publish the scorer again")
