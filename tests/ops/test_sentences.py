"""Errors: the type and the sentence that people who know PyTorch search for.

The statements and sentences are in tests/ops/sentences.py, PyTorch's own words are recorded.
"""

from __future__ import annotations

import pytest

from tests.ops.comparing import check_error
from tests.ops.sentences import ERRORS


@pytest.mark.parametrize("text", ERRORS)
def test_the_error_is_pytorchs(text):
    check_error(text)
