import pytest

from cluster.config import SamplerConfig
from cluster.errors import CappyError
from generation.empty_responses import check_empty_share, empty_warning


@pytest.mark.parametrize(("empty", "sampled", "share"), [(0, 0, 0.0), (0, 9, 0.0), (5, 10, 0.5), (10, 10, 1.0)])
def test_a_share_up_to_the_limit_is_accepted(empty, sampled, share):
    check_empty_share(empty, sampled, SamplerConfig(max_empty_share=share))


def test_a_share_above_the_limit_is_an_error_with_the_setting_and_the_fix():
    message = r"6 of 10 sampled responses are empty, above sampler\.max_empty_share=0\.5; .*max_tokens.*; start again with --overwrite"
    with pytest.raises(CappyError, match=message):
        check_empty_share(6, 10, SamplerConfig())


def test_empty_responses_are_reported():
    assert empty_warning(0, 10) == ""
    assert empty_warning(1, 10).startswith("1 of 10 sampled responses are empty")
