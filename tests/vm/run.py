"""Run a command on another kernel: ``python -m tests.vm.run [OPTION...] KERNEL... -- COMMAND...``

A QEMU virtual machine is booted with the wanted kernel and *this machine's* root file system: ``/`` is
shared read-only over 9p and covered with a tmpfs, so the guest sees the same Python, the same virtual
environment and the same checkout, may write anywhere, and leaves nothing behind.  No image is built.  The
guest is emulated (TCG), so it needs no /dev/kvm and runs wherever CI does, 15 to 20 times slower than the
host.

    host                                            guest
    run.py --- pipe <- virtio port "stdout" ------- fifo <- the command's stdout
           --- pipe <- virtio port "stderr" ------- fifo <- the command's stderr
           --- a temporary directory, 9p "lane" --- /run/vm/lane: command, visible; status
           --- /, 9p "host", read-only ------------ / (below an overlay)
           --- console (a file) ------------------- kernel messages, init's complaints

The exit status is the command's.  124 says that the time was up, 125 that there is no verdict: the machine
was lost (panic, QEMU died) or never started.  Python callers get `TimedOut` and `LostVM` for these.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from tests.vm import initramfs, kernels

QEMU = "qemu-system-x86_64"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
EXIT_TIMED_OUT = 124
EXIT_NO_VERDICT = 125
SCRATCH_SIZE = 256 << 20
CONSOLE_TAIL = 60  # lines

CMDLINE = (
    *("console=ttyS0", "quiet", "loglevel=4"),
    *("panic=-1", "oops=panic"),  # a broken kernel ends QEMU (-no-reboot) at once
    *("mitigations=off", "random.trust_cpu=1", "tsc=reliable", "no_timer_check"),  # faster boot
    # Not patching locks away for one CPU saves emulation the retranslation; that self-test takes 0.2 s.
    *("noreplace-smp", "initcall_blacklist=jent_mod_init"),
)


class LostVM(Exception):
    """The machine went away without the command's exit status.  This is not a verdict on the command."""

    def __init__(self, message: str, console: str = "") -> None:
        super().__init__(f"{message}\n{console}".rstrip())


class TimedOut(Exception):
    """The command was still running when its time was up."""


def missing_requirements(*, ext4: bool = False) -> list[str]:
    """What this machine lacks to run a guest: a line for each, with the Debian package that has it."""
    missing = []
    if shutil.which(QEMU) is None:
        missing.append(f"no {QEMU}: apt-get install --no-install-recommends qemu-system-x86")
    if initramfs.find_busybox() is None:
        missing.append("no statically linked busybox: apt-get install busybox-static")
    if shutil.which("dpkg") is None or shutil.which("apt-get") is None:
        missing.append("no dpkg and apt-get: the kernels are Debian packages")
    if ext4 and shutil.which("mkfs.ext4", path=PATH) is None:
        missing.append("no mkfs.ext4: apt-get install e2fsprogs")
    return missing


def run(
    kernel: str,
    command: Sequence[str],
    *,
    timeout: float = 540.0,
    memory: str = "2G",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    visible: Sequence[Path] = (),
    ext4: bool = False,
    keep: bool = False,
    stdout: BinaryIO | None = None,
    stderr: BinaryIO | None = None,
) -> int:
    """Run `command` in a guest with `kernel` and return its exit status; raise `TimedOut` or `LostVM`.

    Its output is written to `stdout` and `stderr` (default: ours) as it comes.  `timeout` includes the boot.
    The guest has its own /tmp, in which it sees `cwd` and the directories `visible` if they are below /tmp.
    `ext4` adds an empty ext4 file system at /mnt/ext4.  `keep` leaves the directory with the console's log.
    """
    if missing := missing_requirements(ext4=ext4):
        raise LostVM("\n".join(missing))
    ready = kernels.ensure(kernel)
    modules = initramfs.MODULES + (initramfs.EXT4_MODULES if ext4 else ())
    archive = initramfs.ensure(ready, modules)
    cwd = Path.cwd() if cwd is None else cwd.resolve()
    lane = Path(tempfile.mkdtemp(prefix="agentrun-vm-"))
    try:
        shown = [path.resolve() for path in (cwd, *visible)]
        (lane / "visible").write_text("".join(f"{path}\n" for path in shown if Path("/tmp") in path.parents))
        (lane / "command").write_text(_script(command, cwd, {"AGENTRUN_VM": kernel, **(env or {})}))
        argv = [*_machine(ready, archive, memory, lane, ext4=ext4)]
        if ext4:
            argv += _scratch_disk(lane / "scratch.img")
        qemu_status = _boot(argv, stdout or sys.stdout.buffer, stderr or sys.stderr.buffer, timeout)
        try:
            return int((lane / "status").read_text())
        except FileNotFoundError:
            raise LostVM(*_last_words(lane, ready, qemu_status)) from None
    finally:
        if keep:
            print(f"vm: kept {lane}", file=sys.stderr)
        else:
            shutil.rmtree(lane)


def _script(command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> str:
    environment = {"PATH": PATH, "HOME": "/root", "PYTHONDONTWRITEBYTECODE": "1", **env}
    exports = "".join(f"export {shlex.quote(f'{key}={value}')}\n" for key, value in environment.items())
    return f"cd {shlex.quote(str(cwd))} || exit\nunset TERM SHLVL OLDPWD\n{exports}exec {shlex.join(command)}\n"


def _machine(kernel: kernels.Unpacked, archive: Path, memory: str, lane: Path, *, ext4: bool) -> list[str]:
    """QEMU's command line, but for the chardevs `stdout` and `stderr`."""
    cmdline = [*CMDLINE, f"vm.modules={kernel.modules}", *(["vm.ext4"] if ext4 else [])]
    return [
        # One CPU only: with two, TCG loses races with the kernel's patching of its own code ("Oops: int3").
        *(QEMU, "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", memory),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(archive), "-append", " ".join(cmdline)),
        *("-serial", f"file:{_escaped(lane / 'console')}", "-device", "virtio-rng-pci"),
        *("-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=stdout,name=stdout"),
        *("-device", "virtserialport,chardev=stderr,name=stderr"),
        *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        *("-fsdev", f"local,id=lane,path={_escaped(lane)},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=lane,mount_tag=lane"),
    ]


def _scratch_disk(image: Path) -> list[str]:
    """A formatted disk.  Formatting is done here because it takes the host 20 ms, and the guest a second."""
    with image.open("wb") as file:
        file.truncate(SCRATCH_SIZE)
    options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", options, str(image)], check=True, env={**os.environ, "PATH": PATH})
    drive = f"file={_escaped(image)},if=none,id=scratch,format=raw,cache=unsafe"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=scratch"]


def _escaped(path: Path) -> str:
    """A path as (part of) an option's value, where QEMU takes a comma for the end of it."""
    return str(path).replace(",", ",,")


def _boot(argv: Sequence[str], stdout: BinaryIO, stderr: BinaryIO, timeout: float) -> int:
    """Run QEMU until it ends, passing on what its two ports say; leave no process behind in any case."""
    deadline = time.monotonic() + timeout
    writers: list[int] = []
    chardevs: list[str] = []
    threads = []
    for name, sink in (("stdout", stdout), ("stderr", stderr)):
        reader, writer = os.pipe()
        writers.append(writer)
        chardevs += ["-chardev", f"file,id={name},path=/proc/self/fd/{writer}"]
        threads.append(threading.Thread(target=_pass_on, args=(reader, sink), name=f"vm {name}"))
    # A session of its own: the terminal's ctrl-C is for us, and we then end QEMU.  If even we are killed,
    # --pdeathsig does it (the "parent" is this thread, which waits below).
    qemu = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", argv[0], *chardevs, *argv[1:]],
        stdin=subprocess.DEVNULL,
        pass_fds=writers,
        start_new_session=True,
    )
    try:
        for writer in writers:
            os.close(writer)
        for thread in threads:
            thread.start()
        return qemu.wait(deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        raise TimedOut(f"still running after {timeout:g} s") from None
    finally:
        if qemu.poll() is None:
            os.killpg(qemu.pid, signal.SIGKILL)
            qemu.wait()
        for thread in threads:
            thread.join()


def _pass_on(reader: int, sink: BinaryIO) -> None:
    with open(reader, "rb", buffering=0) as source:
        while chunk := source.read(1 << 16):
            try:
                sink.write(chunk)
                sink.flush()
            except (BrokenPipeError, ValueError):  # nobody listens any more; the guest must not block on that
                continue


def _last_words(lane: Path, kernel: kernels.Unpacked, qemu_status: int) -> tuple[str, str]:
    console = lane / "console"
    lines = console.read_text(errors="replace").splitlines() if console.exists() else []
    message = f"the VM with kernel {kernel.release} was lost (QEMU's exit status {qemu_status}); its console:"
    return message, "\n".join(line.rstrip() for line in lines[-CONSOLE_TAIL:])


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    own, separator, command = list(argv), len(argv), []
    if "--" in own:
        separator = own.index("--")
        own, command = own[:separator], own[separator + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm.run",
        usage="%(prog)s [OPTION...] KERNEL... -- COMMAND...",
        description=f"Run COMMAND on each KERNEL: {', '.join(k.name for k in kernels.KERNELS)}.",
    )
    parser.add_argument("kernels", metavar="KERNEL", nargs="*", default=[kernels.DEFAULT])
    parser.add_argument("--timeout", metavar="S", type=float, default=540.0, help="seconds for each kernel (540)")
    parser.add_argument("--memory", metavar="SIZE", default="2G", help="the guest's memory (2G)")
    parser.add_argument("--env", metavar="K=V", action="append", default=[], help="add to the environment")
    parser.add_argument("--visible", metavar="DIR", type=Path, action="append", default=[], help="show from /tmp")
    parser.add_argument("--ext4", action="store_true", help="a scratch ext4 file system at /mnt/ext4")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the console's log")
    options = parser.parse_args(own)
    if not command:
        parser.error("no COMMAND: it comes after --")
    if bad := [pair for pair in options.env if "=" not in pair]:
        parser.error(f"--env {bad[0]}: K=V expected")
    return options, command


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str]) -> int:
    options, command = _arguments(argv)
    signal.signal(signal.SIGTERM, _terminated)  # so that `finally` clauses run
    first_failure = 0
    for kernel in options.kernels:
        if len(options.kernels) > 1:
            print(f"=== kernel {kernel} ===", flush=True)
        try:
            status = run(
                kernel,
                command,
                timeout=options.timeout,
                memory=options.memory,
                env=dict(pair.split("=", 1) for pair in options.env),
                visible=options.visible,
                ext4=options.ext4,
                keep=options.keep,
            )
        except TimedOut as error:
            print(f"vm: {error}", file=sys.stderr)
            status = EXIT_TIMED_OUT
        except (LostVM, kernels.KernelUnavailable) as error:
            print(f"vm: {error}", file=sys.stderr)
            status = EXIT_NO_VERDICT
        first_failure = first_failure or status
    return first_failure


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
