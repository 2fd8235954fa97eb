# SPDX-License-Identifier: Apache-2.0
"""The shipped units under a real systemd: run in a guest by test_systemd.py.

    python -m tests.vm.run --ext4 6.12 -- .venv/bin/python -m tests.vm.guest_systemd [NAME...]

Everything is done as systemd/README.md says, with systemctl and the real commands. CALLS are made under the unit with its
programs in the kernel; LIFE is how the unit starts, ends and begins again, six times, so there without them (`probes = false`).
Each has a systemd of its own and its steps build on each other. Output as of guest_oci.py; only the standard library, as there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from tests.vm.guest_oci import step
from tests.vm.unit import Step, installed, prepare
from tests.vm.unit_calls import CALLS
from tests.vm.unit_life import LIFE


def jobs(wanted: list[str]) -> Iterator[tuple[str, dict[str, Step]]]:
    """What this guest does: of several kernels, the second has the units' life and the first their calls."""
    kernels, own = os.environ.get("SYSTEMD_KERNELS", "").split(), os.environ.get("AGENTRUN_VM", "")
    share = kernels.index(own) % 2 if len(kernels) > 1 and own in kernels else None
    for number, (config, steps) in enumerate((("", CALLS), ("probes = false\n", LIFE))):
        if wanted:
            steps = {name: function for name, function in steps.items() if name in wanted}
        if steps and share in (None, number):
            yield config, steps


def main(wanted: list[str]) -> int:
    good = True
    prepare()
    for config, steps in jobs(wanted):
        with installed(config) as unit:
            for name, function in steps.items():
                good &= step(name, "agentrun", lambda function=function: function(unit))  # type: ignore[misc]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
