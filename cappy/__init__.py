"""The public Python API of Cappy on Ray: one function for each verb, the config, the regression set and the scorer.

`import cappy` loads neither torch nor Ray nor transformers: each name is imported when it is first used.

Example:
    ```python
    import cappy

    config = cappy.load_config("demo", {"training.epochs": 2})
    cappy.generate(config)
    cappy.train(config)
    print(cappy.evaluate(config)["gain"])
    scorer = cappy.Scorer.load(config.scorer_uri)
    ```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cappy.verbs import (
        adapt,
        annotate,
        answer,
        combine,
        compare,
        evaluate,
        export,
        extend,
        generate,
        inspect,
        list_published,
        plan,
        pull,
        push,
        run,
        score,
        serve,
        train,
    )
    from cluster.config import Config
    from cluster.config import load as load_config
    from generation.dataset import RegressionSet
    from training.scorer import Scorer

__all__ = [
    "Config",
    "RegressionSet",
    "Scorer",
    "adapt",
    "annotate",
    "answer",
    "combine",
    "compare",
    "evaluate",
    "export",
    "extend",
    "generate",
    "inspect",
    "list_published",
    "load_config",
    "plan",
    "pull",
    "push",
    "run",
    "score",
    "serve",
    "train",
]

_VERBS = [name for name in __all__ if name.islower() and name != "load_config"]
_SOURCES = {
    "Config": ("cluster.config", "Config"),
    "load_config": ("cluster.config", "load"),
    "RegressionSet": ("generation.dataset", "RegressionSet"),
    "Scorer": ("training.scorer", "Scorer"),
    **{verb: ("cappy.verbs", verb) for verb in _VERBS},
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
