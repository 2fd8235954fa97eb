# SPDX-License-Identifier: Apache-2.0
"""What agentrun promises about memory bursts, tried on a kernel with a memory controller: run in a guest by test_burst.py.

    python -m tests.vm.run --ext4 6.1 -- .venv/bin/python -m tests.vm.guest_burst [MODE…]

One boot tries the three ways of memory control that a kernel can have: the controller alone, the controller with programs in the
kernel, and the programs alone, in a cgroup that was not given the controller. Verdicts are printed as guest_limits.py does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import trio

from agentrun import Executor, ExecutorConfig, Limits, Outcome, Policy, Result, open_executor
from agentrun.burst.ladder import Mode
from tests.hog import GROWING, available, compile_hog
from tests.vm.guest_limits import EXT4, MIB, MOUNT, verdict

BUDGET = 64 * MIB
TOTAL = 256
"""Megabytes a hog wants: four times its budget."""
CHECK_TIMEOUT = 120.0
BPF_ONLY = MOUNT / "without-memory"
MODES = (Mode.CONTROLLER, Mode.CONTROLLER_BPF, Mode.BPF)
HUGE_PAGE = 2 * MIB

Check = Callable[["Trial"], Awaitable[str]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


class Trial:
    """An executor in one mode, and what its calls work with."""

    def __init__(self, executor: Executor, mode: Mode, directory: Path) -> None:
        self.executor, self.mode, self.directory = executor, mode, directory
        self.hog = compile_hog(directory)

    async def run(self, hog_mode: str, total: float = TOTAL, *, disk: bool = False, **limits: object) -> Result:
        """A hog above a steady budget of ``BUDGET``, unless ``limits`` say otherwise; its files are on tmpfs, or on ``disk``."""
        policy = Policy(name="hog", limits=Limits(**{"memory_high": BUDGET, "memory_max": 1024 * MIB, **limits}))  # type: ignore[arg-type]
        env = {"HOG_DIR": str(self.directory)} if disk else None
        argv = [str(self.hog), hog_mode, f"{total:g}"]
        result = await self.executor.run(argv, policy=policy, timeout=60, env=env, workspace=str(self.directory))
        assert result.memory_mode == self.mode, result
        return result


def rungs(result: Result) -> list[str]:
    return [step.rung for step in result.bursts]


def allowed(mode: Mode, hog_mode: str) -> int:
    """Bytes above the budget that are nobody's fault: a batch of the charging CPU; in huge pages, one of those.

    Where only memory.high brakes, until the governor has woken up: it has to share an emulated processor with the writer.
    """
    batch = {Mode.BPF: MIB, Mode.CONTROLLER_BPF: 5 * MIB, Mode.CONTROLLER: 8 * MIB}[mode]
    return batch + (HUGE_PAGE if hog_mode == "huge" else 0)


def peak_of(result: Result) -> int:
    assert result.usage.memory_peak is not None, result
    return result.usage.memory_peak


@check
async def kill_ends_every_kind_of_writer(trial: Trial) -> str:
    said = []
    for hog_mode in available(GROWING):
        result = await trial.run(hog_mode, on_exhausted="kill")
        assert result.outcome is Outcome.MEMORY_KILLED, (hog_mode, result)
        assert rungs(result)[-1:] == ["killed"], (hog_mode, result)
        over = peak_of(result) - BUDGET
        assert over <= allowed(trial.mode, hog_mode), (hog_mode, over, result)
        said.append(f"{hog_mode} +{over / MIB:.2f} MB")
    return ", ".join(said)


@check
async def stop_holds_until_its_time_is_up(trial: Trial) -> str:
    said = []
    for hog_mode in ("anon", "populate", "fork"):
        result = await trial.run(hog_mode, on_exhausted="stop", freeze_seconds=1.0)
        over = peak_of(result) - BUDGET
        assert result.outcome is Outcome.MEMORY_KILLED, (hog_mode, result)
        # In one system call that populates, no stop holds: where the governor is kept waiting, it is dead before it is frozen.
        assert hog_mode == "populate" or "frozen" in rungs(result), (hog_mode, result)
        assert rungs(result)[-1] == "killed", (hog_mode, result)
        assert over <= allowed(trial.mode, hog_mode), (hog_mode, over, result)
        said.append(f"{hog_mode} +{over / MIB:.2f} MB {rungs(result)}")
    return ", ".join(said)


@check
async def every_rung_is_reached_and_bounded(trial: Trial) -> str:
    result = await trial.run(
        "anon", 512, on_exhausted="throttle", memory_burst=64 * MIB, burst_seconds=0.2, throttle_seconds=1.0, freeze_seconds=1.0
    )
    expected = ["granted", "throttled", "frozen", "killed"] if trial.mode is not Mode.BPF else ["granted", "frozen", "killed"]
    assert result.outcome is Outcome.MEMORY_KILLED, result
    assert rungs(result) == expected, result
    assert result.timings.total < 15, result
    return "; ".join(f"{step.rung} at {step.at:.2f} s with {step.usage / MIB:.1f} MB" for step in result.bursts)


@check
async def a_burst_within_its_allowance_is_let_be(trial: Trial) -> str:
    result = await trial.run("anon", 128, memory_burst=256 * MIB, burst_seconds=30.0)
    assert result.ok, result
    assert "granted" in rungs(result), result
    assert not {"throttled", "frozen", "killed"} & set(rungs(result)), result
    return str(rungs(result))


@check
async def a_budget_ends_with_its_call(trial: Trial) -> str:
    """Those that wait have been built to fit the calls before, which had one; this call has none."""
    for _ in range(3):
        assert (await trial.run("anon", 8, on_exhausted="kill")).ok
        await trio.sleep(0.5)
    free = await trial.run("anon", 200, memory_high=None)
    assert (free.outcome, free.exit_code, free.bursts) == (Outcome.EXITED, 0, ()), free
    held = await trial.run("anon", 200, on_exhausted="kill")
    assert held.outcome is Outcome.MEMORY_KILLED, held
    return f"{peak_of(free) >> 20} MB, then killed at {peak_of(held) >> 20}"


@check
async def what_is_shared_or_given_back_counts_once(trial: Trial) -> str:
    said = []
    for hog_mode in ("cow", "churn"):
        result = await trial.run(hog_mode)
        assert result.ok, (hog_mode, result)
        assert rungs(result) == [], (hog_mode, result)
        said.append(f"{hog_mode} peak {peak_of(result) / MIB:.1f} MB")
    return ", ".join(said)


@check
async def mapped_files_are_written_back(trial: Trial) -> str:
    """Where there is a controller, memory.high holds them to the budget; without one they are the host's page cache."""
    result = await trial.run("shared", 128, disk=True)
    assert result.ok, result
    assert not {"frozen", "killed"} & set(rungs(result)), result
    assert trial.mode is Mode.BPF or peak_of(result) < BUDGET + 4 * MIB, result
    return f"{rungs(result)}, peak {peak_of(result) / MIB:.1f} MB, {result.timings.total:.1f} s"


@check
async def page_cache_is_no_burst(trial: Trial) -> str:
    """Three times the budget is read and written: the kernel drops and writes back what it needs to."""
    command = (
        f"dd if=/dev/zero of=big bs=1M count={3 * BUDGET // MIB} status=none ; cat big big > /dev/null; s=$?; rm big; exit $s"
    )
    policy = Policy(name="reader", limits=Limits(memory_high=BUDGET, memory_max=1024 * MIB))
    result = await trial.executor.run(["sh", "-c", command], policy=policy, workspace=str(trial.directory))
    assert result.ok, result
    assert not {"throttled", "frozen", "killed"} & set(rungs(result)), result
    return f"{rungs(result)}, peak {peak_of(result) / MIB:.1f} MB"


async def in_mode(mode: Mode) -> None:
    directory = EXT4 / f"burst-{mode.value.replace('+', '-')}"
    directory.mkdir()
    async with open_executor(ExecutorConfig(probes=mode is not Mode.CONTROLLER, pool_most=1)) as executor:
        await executor.memory.wait_ready()
        status = executor.memory.status()
        with verdict(f"{mode.value}: is the mode") as details:
            assert status.mode == mode.value, status
            details.append(f"{status.hook}, ready in {status.seconds} s, {status.memory / MIB:.0f} MB")
        trial = Trial(executor, mode, directory)
        for name, function in CHECKS.items():
            with verdict(f"{mode.value}: {name}") as details, trio.fail_after(CHECK_TIMEOUT):
                details.append(await function(trial))
        assert executor.statistics().stuck == 0, "sandboxes could not be removed"
        assert executor.memory.governor.lost == 0, "events were lost"


@contextlib.contextmanager
def without_controller() -> Iterator[None]:
    """A cgroup whose children have no memory controller, as on a hybrid host."""
    BPF_ONLY.mkdir()
    (MOUNT / "cgroup.subtree_control").write_text("-memory")
    os.environ["AGENTRUN_CGROUP"] = str(BPF_ONLY)
    try:
        yield
    finally:
        del os.environ["AGENTRUN_CGROUP"]
        BPF_ONLY.rmdir()
        (MOUNT / "cgroup.subtree_control").write_text("+memory")


def main(names: Sequence[str]) -> None:
    for mode in MODES:
        if not names or mode.value in names:
            with without_controller() if mode is Mode.BPF else contextlib.nullcontext():
                trio.run(functools.partial(in_mode, mode))


if __name__ == "__main__":
    main(sys.argv[1:])
