# SPDX-License-Identifier: Apache-2.0
"""The fixtures of the native client's tests, for every module here that names them."""

import pytest

pytest.register_assert_rewrite("tests.unit.client_support", "tests.unit.zygote_support")

from tests.unit.client_support import agentrun, daemon, start  # noqa: E402, F401
