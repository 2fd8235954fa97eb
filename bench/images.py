"""``python -m bench.images``: how long it takes to take in an image of 1 GB in 20,000 files, beside podman, tar and cp.

Every contender starts from the same bytes, which are in the page cache, and ends with the result on the disk: who does not sync
by himself is followed by ``sync -f``, within the figure. Order drawn anew for each round; what was written is removed between
two, not within the figure. agentrun also checks every digest, writes a manifest with the digest of each file, and refuses what
could reach outside; podman unpacks and checks digests; tar and cp do neither.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import msgspec
import trio

from bench import ROOT
from bench.machine import describe, wait_quiet
from bench.numbers import Report, cell
from tests.image.big import FILES, SIZE, Made, write_tar

TAR = "tar -x"


class Run(msgspec.Struct, frozen=True):
    """One import."""

    contender: str
    round: int
    seconds: float


class Contender(msgspec.Struct, frozen=True):
    """A way to get the image onto the disk; ``argv`` is told the directory that is its own for this round."""

    name: str
    argv: Callable[[Path], list[str]]
    syncs: bool = False
    env: Callable[[Path], dict[str, str]] = lambda _: {}


class Sources(msgspec.Struct, frozen=True):
    """The image in every form."""

    made: Made
    tar: Path
    zstd: Path
    tree: Path
    archive: Path | None
    """An archive of ``podman save``; None if there is no podman."""


def prepare(scratch: Path, report: Report) -> Sources:
    """Make the image, in every form."""
    tar, zstd, tree, archive = (scratch / name for name in ("image.tar", "image.tar.zst", "tree", "saved.tar"))
    made = write_tar(tar, FILES, SIZE)
    call(["zstd", "-q", "-1", "-T0", str(tar), "-o", str(zstd)])
    tree.mkdir()
    call(["tar", "-xf", str(tar), "-C", str(tree)])
    saved = None
    if shutil.which("podman"):
        options = podman(scratch / "maker")
        try:
            call([*options, "import", "--quiet", str(tar), "localhost/big:1"])
            call([*options, "save", "--quiet", "--format", "docker-archive", "-o", str(archive), "localhost/big:1"])
            saved = archive
        except subprocess.CalledProcessError as error:
            report.say(f"LEFT OUT podman load: {error.stderr.strip().splitlines()[-1:]}")
        remove(scratch / "maker")
    else:
        report.say("LEFT OUT podman: not installed")
    os.sync()
    return Sources(made, tar, zstd, tree, saved)


def contenders(sources: Sources) -> list[Contender]:
    """Everybody who can take part here."""

    def agentrun(*words: str) -> Callable[[Path], list[str]]:
        return lambda _: [sys.executable, "-m", "agentrun.cli", "image", *words]

    def store(directory: Path) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT / "runtime"), str(ROOT / "shim")])
        return {"AGENTRUN_IMAGES": str(directory / "store"), "PYTHONPATH": path}

    found = [
        Contender("agentrun import, tar", agentrun("import", str(sources.tar), "big"), True, store),
        Contender("agentrun import, tar.zst", agentrun("import", str(sources.zstd), "big"), True, store),
        Contender("agentrun import, directory", agentrun("import", str(sources.tree), "big"), True, store),
        Contender(TAR, lambda directory: ["tar", "-xf", str(sources.tar), "-C", str(directory)]),
        Contender("cp -a", lambda directory: ["cp", "-a", str(sources.tree), str(directory / "tree")]),
    ]
    if shutil.which("podman"):
        found.append(Contender("podman import, tar", lambda directory: [*podman(directory), "import", "-q", str(sources.tar)]))
    if (archive := sources.archive) is not None:
        found.append(Contender("agentrun import, docker archive", agentrun("import", str(archive), "big"), True, store))
        found.append(Contender("podman load", lambda directory: [*podman(directory), "load", "-q", "-i", str(archive)]))
    return found


def podman(directory: Path) -> list[str]:
    """podman with a storage of its own, in the way it is by default: overlay on this disk."""
    return ["podman", "--root", str(directory / "storage"), "--runroot", str(directory / "run"), "--cgroup-manager", "cgroupfs"]


def call(argv: Sequence[str], env: dict[str, str] | None = None) -> None:
    """Run a program; its words are in the error."""
    subprocess.run(argv, check=True, capture_output=True, text=True, env={**os.environ, **(env or {})})


def remove(directory: Path) -> None:
    """Remove a tree. podman leaves a mount of its storage on itself."""
    subprocess.run(["umount", "-q", str(directory / "storage/overlay")], check=False, capture_output=True)
    shutil.rmtree(directory)


def one(contender: Contender, scratch: Path) -> float:
    """Seconds of one import."""
    directory = scratch / "round"
    directory.mkdir()
    try:
        started = perf_counter()
        call(contender.argv(directory), contender.env(directory))
        if not contender.syncs:
            call(["sync", "-f", str(directory)])
        return perf_counter() - started
    finally:
        remove(directory)
        os.sync()


def measure(rounds: int, scratch: Path, report: Report, seed: int) -> tuple[Sources, list[Run]]:
    """Everybody, in every round, in another order each."""
    sources = prepare(scratch, report)
    report.say(f"image: {sources.made.files} files, {sources.made.size / 1e6:.0f} MB; {rounds} rounds; seed {seed}")
    everybody = contenders(sources)
    order = random.Random(seed)
    runs: list[Run] = []
    for number in range(rounds):
        order.shuffle(everybody)
        for contender in list(everybody):
            try:
                runs.append(Run(contender.name, number, one(contender, scratch)))
            except subprocess.CalledProcessError as error:
                everybody.remove(contender)
                report.say(f"LEFT OUT {contender.name}: {' '.join(error.stderr.split())[-300:]}")
    return sources, runs


def print_runs(made: Made, runs: Sequence[Run], report: Report) -> None:
    """A row for each contender, fastest first."""
    rows: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        rows[run.contender][run.round] = run.seconds
    base = rows.get(TAR, {})
    table = []
    for name, found in sorted(rows.items(), key=lambda item: median(item[1].values())):
        middle = median(found.values())
        ratios = [seconds / base[number] for number, seconds in found.items() if number in base]
        table.append([
            name, str(len(found)), cell(middle), cell(min(found.values())), cell(max(found.values())),
            f"{made.size / 1e6 / middle:.0f}", f"{made.files / middle:.0f}", cell(median(ratios) if ratios else None),
        ])  # fmt: skip
    report.say()
    report.table(["image of 1 GB", "n", "s p50", "min", "max", "MB/s", "files/s", f"x {TAR}"], table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.images", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of every contender (3)")
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), help="a disk with 8 GB free (/var/tmp)")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args(arguments)
    report = Report()
    machine = describe()
    report.say(f"# images, {machine.started}: Linux {machine.kernel}, {machine.processors} x {machine.model}")
    report.say(trio.run(wait_quiet, machine, "images"))
    with tempfile.TemporaryDirectory(prefix="agentrun-bench-images-", dir=options.scratch) as scratch:
        sources, runs = measure(options.rounds, Path(scratch), report, options.seed)
    print_runs(sources.made, runs, report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "images.json").write_bytes(msgspec.json.encode({"machine": machine, "image": sources.made, "runs": runs}))
    report.write(options.out / "images.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
