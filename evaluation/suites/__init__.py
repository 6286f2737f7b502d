"""Suites: evaluations over many tasks, with their tasks, splits and caps in a YAML file of this folder."""

from pathlib import Path

from cluster.errors import UsageError

FOLDER = Path(__file__).resolve().parent


def suite_file(name: str) -> str:
    """Return the config file of a suite: a path, or the name of a file in this folder.

    Raises `UsageError` if there is none.
    """
    known = FOLDER / f"{name}.yaml"
    if not Path(name).exists() and not known.exists():
        names = ", ".join(sorted(each.stem for each in FOLDER.glob("*.yaml")))
        raise UsageError(f"--suite {name}: no such file; give a path or one of: {names}")
    return name if Path(name).exists() else str(known)
