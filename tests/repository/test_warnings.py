from __future__ import annotations

import warnings

import pytest


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_deprecation_is_an_error_in_tests(category: type[Warning]):
    with pytest.raises(category):
        warnings.warn("old", category, stacklevel=1)
