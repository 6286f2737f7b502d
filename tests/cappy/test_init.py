"""`import cappy`: the names of the public API, and the modules that the import does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cappy
from cluster.config import Config
from cluster.errors import UsageError


def test_the_import_loads_neither_torch_nor_ray_nor_transformers():
    code = "import cappy, sys; print([name for name in ('torch', 'ray', 'transformers', 'vllm', 'pyarrow') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_command_line_loads_neither_torch_nor_ray_nor_storage():
    code = "import cappy.cli, sys; print([name for name in ('torch', 'ray', 'transformers', 'vllm', 'pyarrow') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", cappy.__all__)
def test_each_public_name_is_callable_and_documented(name):
    value = getattr(cappy, name)
    assert callable(value) and value.__doc__
    assert name in dir(cappy)


def test_a_verb_is_not_replaced_by_a_module_of_its_package():
    code = """
import cappy.cli, cappy.inspection, cappy.display, cappy.doctor, cappy.jobs, cappy.verbs, types
print([name for name in cappy.__all__ if isinstance(getattr(cappy, name), types.ModuleType)])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cappy' has no attribute 'trainer'"):
        _ = cappy.trainer


def test_load_config_changes_single_settings_of_a_file_a_config_or_the_defaults():
    assert cappy.load_config(None, {"training.learning_rate": 1e-5, "training.epochs": 2}).training.learning_rate == 1e-5
    demo = cappy.load_config("demo", {"training.epochs": 2})
    assert demo.training.epochs == 2 and demo.workspace == cappy.load_config("demo").workspace
    again = cappy.load_config(demo, {"sampler.decodings.0.max_tokens": 9})
    assert again.training.epochs == 2 and again.sampler.decodings[0].max_tokens == 9
    assert cappy.load_config(demo) == demo and isinstance(demo, Config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.epoch": 2}, "unknown key training.epoch; did you mean 'epochs'?"),
        ({"training.epochs": 0}, "training.epochs=0: Input should be greater than or equal to 1"),
        ({"workspace.a": 1}, "workspace.a=1: workspace holds a plain value, so it has no key 'a'"),
    ],
)
def test_an_invalid_setting_is_named_with_its_value(settings, message):
    with pytest.raises(UsageError) as error:
        cappy.load_config("demo", settings)
    assert message in str(error.value)
