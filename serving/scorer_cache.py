"""The scorers a replica holds: the main one always, others once they are asked for, each replaced when it is published anew.

Loading takes seconds, so it happens in threads of its own, once for all who wait for it; it is no matter of the other
scorers, and neither is a scorer that cannot be loaded. Knows no Ray.
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
from cluster.errors import CappyError

if TYPE_CHECKING:
    from training.scorer import Dtype, Scorer

logger = logging.getLogger("ray.serve")
# Seconds the request that finds a scorer due for a look waits for new weights; they answer the next one where they take longer.
_PATIENCE_S = 2.0
_THREADS = 4
# transformers exchanges functions of torch while it loads a model, for the whole process.
_loading = threading.Lock()


class ScorerUnavailable(CappyError):
    """A scorer that is configured cannot be loaded; the log says why."""


@dataclass(frozen=True)
class LoadedScorer:
    """A scorer in memory."""

    model: Scorer
    version: str | None
    """12 hex digits of its manifest's hash; None for what no verb of ours published, which is taken not to change."""
    logprob_weight: float | None
    """See `Scorer.logprob_weight`."""


@dataclass
class _Place:
    """What is known of one scorer."""

    uri: str
    setting: str
    held: LoadedScorer | None = None
    looked: float = float("-inf")
    work: asyncio.Future[LoadedScorer | None] | None = None
    """The look or load under way."""
    trouble: str | None = None
    """What was last said in the log about why it cannot be loaded."""


class ScorerCache:
    """Scorers by name. `main` is loaded here and now and stays; of `further` at most `room` are held.

    `dtype` is as `Scorer.load` takes it, `clock` gives seconds. Raises `CappyError` where the main one cannot be loaded.
    """

    def __init__(
        self,
        main: str,
        main_uri: str,
        further: Mapping[str, str],
        *,
        room: int,
        reload_s: float,
        dtype: Dtype,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.main, self._room, self._reload_s, self._dtype, self._clock = main, room, reload_s, dtype, clock
        self._places = {name: _Place(uri, f"scorer {name!r}: path") for name, uri in further.items()}
        self._places[main] = _Place(main_uri, "scorer_path", load_if_changed(main_uri, "scorer_path", None, dtype), clock())
        self._used: OrderedDict[str, None] = OrderedDict()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="scorers")

    @property
    def held(self) -> list[str]:
        """The names of the scorers in memory, the main one first and then the one to go next."""
        return [self.main, *self._used]

    async def get(self, name: str) -> LoadedScorer:
        """Return a scorer, loaded or replaced first where that is due. Cancelling the call leaves its load to others.

        Raises `ScorerUnavailable` where it cannot be loaded; that is tried again after `reload_s`. Raises `KeyError` for a name that
        is not configured.
        """
        place = self._places[name]
        due = place.work is None and self._clock() - place.looked >= self._reload_s
        if due:
            place.looked = self._clock()
            place.work = asyncio.ensure_future(self._renew(name, place))
        held = place.held
        if place.work is not None and held is None:
            held = await asyncio.shield(place.work)
        elif place.work is not None and due:
            await asyncio.wait({place.work}, timeout=_PATIENCE_S)
            held = place.held or held
        if held is None:
            raise ScorerUnavailable(f"the scorer {name!r} cannot be loaded")
        if name in self._used:
            self._used.move_to_end(name)
        return held

    async def _renew(self, name: str, place: _Place) -> LoadedScorer | None:
        """Look at where a scorer is and load what is new there; return what is held then."""
        before = place.held
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._threads, load_if_changed, place.uri, place.setting, before, self._dtype
            )
        except Exception as error:  # whatever is wrong with one scorer, the server goes on
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, CappyError) else str(error)
            if reason != place.trouble:
                kept = "the one loaded before goes on answering" if before else "requests for it are answered 503"
                logger.warning("scorer %r cannot be loaded (%s): %s", name, reason, kept)
            place.trouble = reason
            return before
        finally:
            place.work = None
        if found is not before:
            logger.info("scorer %r: loaded version %s", name, found.version)
        place.held, place.trouble = found, None
        if name != self.main:
            self._keep(name)
        return found

    def _keep(self, name: str) -> None:
        """Note that a scorer was used now, and let go of the ones there is no room for."""
        self._used[name] = None
        self._used.move_to_end(name)
        while len(self._used) > self._room:
            gone = self._places[self._used.popitem(last=False)[0]]
            gone.held, gone.looked = None, float("-inf")


def load_if_changed(uri: str, setting: str, held: LoadedScorer | None, dtype: Dtype) -> LoadedScorer:
    """Return `held` if it is what is published at `uri`, else what is there, loaded.

    Raises `CappyError` naming `setting` where that is no scorer, is not published any more, or changes meanwhile.
    """
    from training.scorer import Scorer

    version = read_version(uri)
    if held is not None and version == held.version:
        return held
    if held is not None and version is None:
        raise CappyError(f"{setting}={uri} has no {artifacts.MANIFEST} any more: it is being published anew, or was taken back")
    if version is not None:
        _check_weights(uri, setting)
    with _loading:
        model = Scorer.load(uri, dtype, setting=setting)
    if read_version(uri) != version:
        raise CappyError(f"{setting}={uri} was published anew, or taken back, while it was loaded")
    return LoadedScorer(model, version, model.logprob_weight)


def read_version(uri: str) -> str | None:
    """Return what changes with every publication at `uri`: 12 hex digits of the manifest's SHA-256, None where there is none."""
    try:
        return hashlib.sha256(storage.read_bytes(storage.join(uri, artifacts.MANIFEST))).hexdigest()[:12]
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_weights(uri: str, setting: str) -> None:
    """Raise `CappyError` where the weights are not those of the manifest: a copy by other tools brings files in any order."""
    files = artifacts.read_any_manifest(uri, setting)["files"]
    weights = {name: entry for name, entry in files.items() if name.endswith(".safetensors")}
    folder = models.resolve(uri, setting, adapters=True)
    if wrong := artifacts.verify(str(folder), {"files": weights}):
        if storage.is_s3(uri):
            storage.delete(str(folder))  # a copy in the cache, which would never be made again for this manifest
        raise CappyError(f"{setting}={uri}: {wrong[0]}; publish it again")
