"""The kernels the suite is run on, and how they come to be on this machine.

Each supported kernel is a line in `KERNELS`: stock Debian builds, because those are what people run and they
have everything the project wants to see (BTF, kprobes, every cgroup controller).  To fetch one:

1. ask apt which packages exist, match them against the kernel's pattern, take the newest release;
2. ``apt-get download`` its packages and ``dpkg -x`` them into a temporary directory of the cache;
3. keep ``vmlinuz`` and ``modules/``, extract the bootable ELF kernel (`image`), throw the rest away;
4. rename the directory to its final name, the kernel's release.

Only the rename makes a kernel visible, so half a download is never used, and a lock makes a second caller
wait for the first one's result.  Nothing is installed and apt's own state is only read: where it does not
know the package (a bare machine, or a suite the machine does not follow) a private copy of the package
lists is made in the cache.  The sources for that are the machine's own, with the suite's name replaced; so
a mirror configured on this machine is used here too.

    <cache>/6.12.95+deb12-amd64/{vmlinux,vmlinuz,modules/6.12.95+deb12-amd64/,initramfs-*}
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import write_vmlinux


class KernelUnavailable(Exception):
    """The kernel is not in the cache and cannot be fetched."""


@dataclass(frozen=True)
class Kernel:
    """One supported kernel: which Debian releases count as it, and the packages that make one up."""

    name: str
    release: str  # pattern of `uname -r` without the flavour
    # Sets of packages; the first that is complete wins.
    recipes: tuple[tuple[str, ...], ...] = (("linux-image-{}-amd64",),)
    suite: str | None = None  # None: what this machine's apt already follows


KERNELS = (
    Kernel("6.1", r"6\.1\.0-\d+"),
    Kernel("6.12", r"6\.12\.\d+\+deb\d+"),
    Kernel(
        "7.2",
        r"7\.2\.\d+\+deb\d+",
        # Where linux-binary exists, linux-image is an empty package that depends on these two.
        recipes=(("linux-binary-{}-amd64", "linux-modules-{}-amd64"), ("linux-image-{}-amd64",)),
        suite="sid",
    ),
)
DEFAULT = "6.12"


@dataclass(frozen=True)
class Unpacked:
    """A kernel in the cache, ready to boot."""

    name: str
    directory: Path

    @property
    def release(self) -> str:
        return self.directory.name

    @property
    def image(self) -> Path:
        """What to give to QEMU: the ELF kernel where it could be extracted, else the bzImage."""
        vmlinux = self.directory / "vmlinux"
        return vmlinux if vmlinux.exists() else self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        """What to mount at /lib/modules: the directory that holds one directory named by the release."""
        return self.directory / "modules"


def find(name: str) -> Kernel:
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise KernelUnavailable(f"no kernel {name!r}: there are {', '.join(k.name for k in KERNELS)}")


def cache_directory() -> Path:
    """$AGENTRUN_VM_CACHE, else agentrun/vm in the user's cache directory."""
    if chosen := os.environ.get("AGENTRUN_VM_CACHE"):
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "agentrun" / "vm"


def unpacked(name: str) -> Unpacked | None:
    """The newest release of this kernel in the cache."""
    kernel, cache = find(name), cache_directory()
    pattern = re.compile(kernel.release + "-amd64")
    found = [d for d in cache.iterdir() if pattern.fullmatch(d.name)] if cache.is_dir() else []
    return Unpacked(name, max(found, key=lambda d: _natural(d.name))) if found else None


def ensure(name: str, *, refresh: bool = False) -> Unpacked:
    """This kernel from the cache, fetched first if it is not there or (`refresh`) a newer one exists."""
    ready = unpacked(name)
    if ready is not None and not refresh:
        return ready
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / ".lock"):
        ready = unpacked(name)  # another process may have been quicker
        if ready is None or refresh:
            _fetch(find(name), cache)
            ready = unpacked(name)
    if ready is None:
        raise KernelUnavailable(f"kernel {name} was fetched but is not in {cache}")
    return ready


def _fetch(kernel: Kernel, cache: Path) -> None:
    options, packages = _search(kernel, cache)
    release = packages[0].removeprefix("linux-image-").removeprefix("linux-binary-")
    target = cache / release
    if target.exists():
        return
    print(f"fetching kernel {kernel.name}: {' '.join(packages)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as temporary:
        root = Path(temporary, "root")
        keep = Path(temporary, "keep")
        keep.mkdir()
        _run(["apt-get", *options, "download", "-qq", *packages], cwd=temporary)
        for deb in Path(temporary).glob("*.deb"):
            _run(["dpkg", "-x", str(deb), str(root)], cwd=temporary)
            deb.unlink()
        _only(root, f"boot/vmlinuz-{release}", f"usr/lib/modules/{release}/vmlinuz").rename(keep / "vmlinuz")
        modules = _only(root, f"lib/modules/{release}", f"usr/lib/modules/{release}")
        (keep / "modules").mkdir()
        modules.rename(keep / "modules" / release)
        if shutil.which("depmod"):
            layout = Path(temporary, "depmod/lib")  # depmod insists on BASE/lib/modules/RELEASE
            layout.mkdir(parents=True)
            (layout / "modules").symlink_to(keep / "modules")
            _run(["depmod", "-b", str(layout.parent), release], cwd=temporary)
        write_vmlinux(keep / "vmlinuz", keep / "vmlinux")
        keep.rename(target)


def _only(root: Path, *candidates: str) -> Path:
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise KernelUnavailable(f"the package has none of {', '.join(candidates)}")


def _search(kernel: Kernel, cache: Path) -> tuple[list[str], list[str]]:
    """apt options and the packages of the newest release: in the machine's lists, else in a private copy."""
    if kernel.suite is None:
        packages = _newest(kernel, _package_names([]))
        if packages:
            return [], packages
    options = _private_lists(cache / f"apt-{kernel.suite or 'own'}", kernel.suite)
    _run(["apt-get", *options, "update", "-qq"])
    packages = _newest(kernel, _package_names(options))
    if not packages:
        where = f"suite {kernel.suite}" if kernel.suite else "this machine's apt sources"
        raise KernelUnavailable(f"kernel {kernel.name}: no package of {where} matches {kernel.release}")
    return options, packages


def _package_names(options: Sequence[str]) -> set[str]:
    return set(_run(["apt-cache", *options, "pkgnames", "linux-"]).split())


def _newest(kernel: Kernel, names: set[str]) -> list[str]:
    for recipe in kernel.recipes:
        prefix, suffix = recipe[0].split("{}")
        pattern = re.compile(f"{re.escape(prefix)}({kernel.release}){re.escape(suffix)}")
        releases = [match[1] for name in names if (match := pattern.fullmatch(name))]
        for release in sorted(releases, key=_natural, reverse=True):
            packages = [package.format(release) for package in recipe]
            if names.issuperset(packages):
                return packages
    return []


def _private_lists(directory: Path, suite: str | None) -> list[str]:
    """apt options that keep package lists in `directory`, of `suite` or of the machine's own."""
    (directory / "lists/partial").mkdir(parents=True, exist_ok=True)
    (directory / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    options = {
        "APT::Sandbox::User": "root",  # else apt, run as root, drops to a user who cannot write to the cache
        "Dir::State::lists": str(directory / "lists"),
        "Dir::Cache": str(directory / "cache"),
    }
    if suite is not None:
        parts = directory / "sources"
        parts.mkdir(exist_ok=True)
        for source in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]:
            if source.suffix in {".list", ".sources"} and source.is_file():
                _derive_source(source, parts / source.name, suite)
        options |= {"Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": str(parts)}
    return [argument for key, value in options.items() for argument in ("-o", f"{key}={value}")]


def _derive_source(source: Path, target: Path, suite: str) -> None:
    """Copy what `source` says about this machine's release to `target`, about `suite` instead."""
    codename = re.escape(platform.freedesktop_os_release().get("VERSION_CODENAME", "stable"))
    text = source.read_text()
    if source.suffix == ".list":  # deb [options] URI SUITE COMPONENT...
        pattern = rf"^(deb\s+(?:\[[^]]*\]\s+)?\S+\s+){codename}(\s.*)$"
        kept = [f"{m[1]}{suite}{m[2]}" for m in re.finditer(pattern, text, re.MULTILINE)]
    else:  # deb822: stanzas of `Field: value`
        pattern = rf"^(Suites:)(?:.*\s){codename}(?:\s.*)?$"
        stanzas = re.split(r"\n[ \t]*\n", text)
        kept = [
            re.sub(pattern, rf"\1 {suite}", stanza, flags=re.MULTILINE) + "\n"
            for stanza in stanzas
            if re.search(pattern, stanza, re.MULTILINE)
        ]
    target.write_text("".join(f"{entry}\n" for entry in kept))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by close
        yield


def _run(argv: list[str], cwd: str | None = None) -> str:
    try:
        result = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise KernelUnavailable(f"{argv[0]} is not installed: kernels come as Debian packages") from error
    if result.returncode != 0:
        raise KernelUnavailable(f"{' '.join(argv)}: exit status {result.returncode}\n{result.stderr.strip()}")
    return result.stdout


def _natural(release: str) -> list[tuple[int, str]]:
    """Sort key that puts 6.12.100 after 6.12.99."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", release)]


def main(arguments: list[str]) -> int:
    """``python -m tests.vm.kernels [--refresh] [KERNEL...]``: fetch ahead of time, print where."""
    refresh = "--refresh" in arguments
    names = [a for a in arguments if a != "--refresh"] or [DEFAULT]
    try:
        for name in names:
            print(name, ensure(name, refresh=refresh).directory)
    except KernelUnavailable as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
