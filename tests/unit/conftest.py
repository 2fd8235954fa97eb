# SPDX-License-Identifier: Apache-2.0
"""The fixtures of the native client's and the zygote's tests, for every module here that names them."""

import pytest

pytest.register_assert_rewrite("tests.unit.client_support", "tests.unit.zygote_support")

from tests.unit.client_support import agentrun, daemon, start  # noqa: E402, F401
from tests.unit.zygote_support import fragile, nothing_left, zygote  # noqa: E402, F401
