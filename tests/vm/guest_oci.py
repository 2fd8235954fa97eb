# SPDX-License-Identifier: Apache-2.0
"""The OCI runtime under real engines, on a kernel with all of cgroup v2: run in a guest by test_oci.py.

    python -m tests.vm.run --ext4 6.12 -- .venv/bin/python -m tests.vm.guest_oci [NAME...]

podman runs every step twice, with agentrun-oci and with crun, and both have to come out the same. containerd's `ctr` does so
with runc beside it. Each step prints one JSON object, ``{"name", "runtime", "found" or "error", "seconds"}``. Only the standard
library: an import costs a guest seconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.vm.manager import Tool, booted

SCRATCH = Path("/mnt/ext4")
ROOTFS = SCRATCH / "rootfs"
OURS = "/run/agentrun/agentrun-oci"
RUNTIMES = {"podman": {"agentrun": OURS, "crun": "crun"}, "ctr": {"agentrun": OURS, "runc": "runc"}}
CGROUPS = Path("/sys/fs/cgroup")
APPLETS = "cat chmod dd echo env false grep head hostname id kill ls mkdir mount ps sh sleep stat stty test touch true tty wc"
SECCOMP = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
}
ROOTLESS_UID = 4711

PODMAN: dict[str, Callable[[Podman], Any]] = {}
CTR: dict[str, Callable[[Ctr], Any]] = {}


def podman(function: Callable[[Podman], Any]) -> Callable[[Podman], Any]:
    PODMAN[function.__name__] = function
    return function


def ctr(function: Callable[[Ctr], Any]) -> Callable[[Ctr], Any]:
    CTR[function.__name__] = function
    return function


class Podman(Tool):
    def __init__(self, runtime: str, *, user: int | None = None) -> None:
        where = SCRATCH / (f"podman-{user}" if user else "podman")
        env = {**os.environ, "XDG_RUNTIME_DIR": f"/run/user/{user or 0}", "HOME": str(where), "PATH": os.environ["PATH"]}
        Path(env["XDG_RUNTIME_DIR"]).mkdir(parents=True, exist_ok=True)
        where.mkdir(exist_ok=True)
        if user:
            for path in (env["XDG_RUNTIME_DIR"], where):
                os.chown(path, user, user)
        front = [
            "podman", "--root", f"{where}/root", "--runroot", f"{env['XDG_RUNTIME_DIR']}/podman", "--storage-driver", "vfs",
            "--events-backend", "none", "--cgroup-manager", "cgroupfs", "--runtime", runtime,
        ]  # fmt: skip
        super().__init__(front, env, user)

    def run(self, *arguments: str, flags: tuple[str, ...] = ("--rm",)) -> subprocess.CompletedProcess[str]:
        return self("run", "--network", "none", *flags, "--rootfs", str(ROOTFS), *arguments)

    def shell(self, script: str, *flags: str) -> str:
        done = self.run("sh", "-c", script, flags=("--rm", *flags))
        assert done.returncode == 0, (done.returncode, done.stderr, done.stdout)
        return done.stdout.strip()

    def start(self, name: str, script: str, *flags: str) -> str:
        done = self.run("sh", "-c", script, flags=("-d", "--name", name, *flags))
        assert done.returncode == 0, (done.returncode, done.stderr)
        return done.stdout.strip()

    def inspect(self, name: str, what: str) -> str:
        return self.must("inspect", "--type", "container", name, "--format", what)

    def wait(self, name: str, status: str) -> None:
        deadline = time.monotonic() + 30
        while self.inspect(name, "{{.State.Status}}") != status:
            assert time.monotonic() < deadline, self.inspect(name, "{{.State.Status}}")
            time.sleep(0.2)


@podman
def exit_codes(p: Podman) -> Any:
    return [p.run(*argv).returncode for argv in (["true"], ["sh", "-c", "exit 3"], ["/plain"], ["no-such-program"])]


@podman
def errors_are_told(p: Podman) -> Any:
    """The words differ, what podman makes of them does not."""
    return [re.findall(r"OCI [\w ]+", p.run(name).stderr)[-1:] for name in ("no-such-program",)]


@podman
def options_of_run(p: Podman) -> Any:
    volume = SCRATCH / "volume"
    volume.mkdir(exist_ok=True)
    volume.chmod(0o777)
    (volume / "made").unlink(missing_ok=True)
    (SCRATCH / "seccomp.json").write_text(json.dumps(SECCOMP))
    script = (
        "id; grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status; touch /x 2>&1; touch /vol/made && echo made;"
        "touch /ro/x 2>&1; head -c 2 /dev/zz | wc -c; cat /proc/sys/net/ipv4/ip_forward; ulimit -n; ulimit -Hn; hostname; pwd;"
        "echo $A; mkdir /tmp/d 2>&1; touch /tmp/ok && echo tmp; cat /proc/self/oom_score_adj; ls -d /proc/acpi /proc/kcore;"
        "cat /proc/kcore | head -c 1 | wc -c; (echo x > /proc/sys/kernel/hostname) 2>&1;"
        "mount | grep -c ' on /sys/fs/cgroup type cgroup2 (ro'; true"
    )
    flags = (
        "--read-only", "--cap-drop", "all", "--cap-add", "kill", "--user", "1000:1001",
        "-v", f"{volume}:/vol", "-v", f"{volume}:/ro:ro",
        "--device", "/dev/zero:/dev/zz", "--sysctl", "net.ipv4.ip_forward=1", "--ulimit", "nofile=123:456", "--hostname", "box",
        "--env", "A=b c", "--workdir", "/work", "--security-opt", f"seccomp={SCRATCH}/seccomp.json", "--oom-score-adj", "77",
        "--security-opt", "no-new-privileges",
    )  # fmt: skip
    return p.shell(script, *flags).split("\n")


@podman
def user_namespace(p: Podman) -> Any:
    script = (
        "cat /proc/self/uid_map; id -u; touch /tmp/x && stat -c %u /tmp/x; ls -ld /dev/null | head -c 10; cat /proc/self/gid_map"
    )
    out = p.shell(script, "--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", "--tmpfs", "/tmp")
    return [" ".join(line.split()) for line in out.split("\n")]


@podman
def terminal(p: Podman) -> Any:
    out = p.shell("tty; test -t 0 && test -t 1 && test -t 2 && echo yes; test -c /dev/console && echo console", "-t")
    return out.replace("\r", "").split("\n")


@podman
def life(p: Podman) -> Any:
    """One container through everything that can be done to it."""
    found: dict[str, Any] = {}
    script = "trap 'echo got it; exit 9' USR1; echo hello; echo oops >&2; while :; do sleep 0.1; done"
    name = p.start("a", script, "--memory", "64m", "--pids-limit", "50")
    found["status"] = p.inspect("a", "{{.State.Status}}")
    found["exec"] = [p("exec", "a", "sh", "-c", f"exit {code}").returncode for code in (0, 5)]
    found["exec not found"] = p("exec", "a", "no-such-program").returncode
    found["exec as"] = p.must(
        "exec", "--user", "5:6", "--workdir", "/work", "--env", "B=x", "a", "sh", "-c", "id -u; id -g; pwd; echo $B"
    ).split()
    found["exec terminal"] = p.must("exec", "-t", "a", "sh", "-c", "test -t 1 && echo yes").strip()
    found["top"] = p.must("top", "a", "user", "pid", "comm").split("\n")[1].split()
    p.must("pause", "a")
    found["paused"] = p.inspect("a", "{{.State.Status}}")
    p.must("unpause", "a")
    found["resumed"] = p.inspect("a", "{{.State.Status}}")
    p.must("update", "--memory", "96m", "a")
    pid = p.inspect("a", "{{.State.Pid}}")
    group = CGROUPS / Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::/")
    found["limits"] = [(group / file).read_text().strip() for file in ("memory.max", "pids.max")]
    found["limits inside"] = Path(f"/proc/{pid}/root/sys/fs/cgroup/memory.max").read_text().strip()
    stats = json.loads(p.must("stats", "--no-stream", "--format", "json", "a"))[0]
    found["stats"] = [
        stats["name"],
        stats["mem_usage"].split("/")[1].strip(),
        stats["mem_usage"].split("/")[0].strip() != "0B",
        int(stats["pids"]) > 0,
    ]
    found["logs"] = sorted(p.must("logs", "a").split("\n"))
    p.must("kill", "--signal", "USR1", "a")
    p.wait("a", "exited")
    found["ended"] = [p.inspect("a", "{{.State.ExitCode}}"), p.must("logs", "--tail", "1", "a")]
    p.must("start", "a")
    found["again"] = p.inspect("a", "{{.State.Status}}")
    p.must("stop", "--time", "1", "a")
    found["stopped"] = p.inspect("a", "{{.State.ExitCode}} {{.State.OOMKilled}}")
    p.must("rm", "-f", "a")
    found["left"] = [str(path) for path in CGROUPS.rglob(f"*{name}*") if "conmon" not in path.name]
    return found


@podman
def remove_what_runs(p: Podman) -> Any:
    p.start("f", "sleep 1000")
    p.must("rm", "-f", "--time", "0", "f")
    return p.must("ps", "-a", "--format", "{{.Names}}")


@podman
def memory_limit(p: Podman) -> Any:
    """The kernel kills the hog; podman learns why from conmon, which watches the cgroup of the first process.

    Debian's conmon writes its note where podman was started, and Debian's podman looks for it in the container's directory.
    """
    hog = ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"]
    p.must("create", "--name", "o", "--network", "none", "--memory", "32m", "--memory-swap", "32m", "--rootfs", str(ROOTFS), *hog)
    done = p("start", "o", cwd=p.inspect("o", "{{.StaticDir}}"))
    assert done.returncode == 0, done.stderr
    p.wait("o", "exited")
    found = p.inspect("o", "{{.State.ExitCode}} {{.State.OOMKilled}}")
    p.must("rm", "-f", "o")
    return found


@podman
def healthcheck(p: Podman) -> Any:
    p.start("h", "sleep 1000", "--health-cmd", "test -e /tmp/well", "--health-interval", "disable", "--tmpfs", "/tmp")
    first = p("healthcheck", "run", "h").returncode
    p.must("exec", "h", "touch", "/tmp/well")
    second = p("healthcheck", "run", "h").returncode
    p.must("rm", "-f", "--time", "0", "h")
    return [first, second]


@podman
def pod(p: Podman) -> Any:
    """Two containers of a pod share what pods share: net, ipc, uts; not pid, not mounts."""
    p.must("pod", "create", "--name", "pod", "--network", "none", "--share", "net,ipc,uts", "--hostname", "podhost")
    found = []
    for name in ("one", "two"):
        done = p("run", "-d", "--pod", "pod", "--name", name, "--rootfs", str(ROOTFS), "sleep", "1000")
        assert done.returncode == 0, done.stderr
        pid = p.inspect(name, "{{.State.Pid}}")
        found.append({kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "ipc", "uts", "pid", "mnt")})
    host = p.must("exec", "one", "hostname")
    same = {kind: found[0][kind] == found[1][kind] for kind in found[0]}
    p.must("pod", "rm", "-f", "--time", "0", "pod")
    return [host, same]


@podman
def rootless(p: Podman) -> Any:
    """Another user, whose podman makes a user namespace first and calls the runtime in it."""
    other = Podman(p.front[-1], user=ROOTLESS_UID)
    out = other.shell(
        "id -u; cat /proc/self/uid_map; touch /tmp/x && echo made; hostname; exit 0", "--tmpfs", "/tmp", "--hostname", "small"
    )
    codes = [other.run("sh", "-c", "exit 4").returncode, other.run("no-such-program").returncode]
    other.start("r", "sleep 1000")
    executed = other("exec", "r", "sh", "-c", "id -u; exit 6")
    other.must("rm", "-f", "--time", "0", "r")
    return [[" ".join(line.split()) for line in out.split("\n")], codes, executed.stdout, executed.returncode]


# ----------------------------------------------------------------------------------------------------- containerd


class Ctr(Tool):
    def __init__(self, runtime: str) -> None:
        self.runtime = runtime
        super().__init__(["ctr", "--address", "/run/oci-containerd/sock"])

    def run(self, name: str, *arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return self("run", "--runc-binary", self.runtime, *flags, "--rootfs", str(ROOTFS), name, *arguments)

    def wait(self, name: str, status: str) -> None:
        deadline = time.monotonic() + 30
        while not re.search(rf"^{name}\s+\d+\s+{status}", self.must("task", "ls"), re.MULTILINE):
            assert time.monotonic() < deadline, self.must("task", "ls")
            time.sleep(0.2)


@ctr
def run_in_the_foreground(c: Ctr) -> Any:
    done = [c.run(f"f{code}", "/bin/sh", "-c", f"echo out; exit {code}", flags=("--rm",)) for code in (0, 3)]
    missing = c.run("m", "no-such-program", flags=("--rm",))
    return [[one.returncode, one.stdout] for one in done] + [
        missing.returncode,
        "executable file not found in $PATH" in missing.stderr,
    ]


@ctr
def a_task(c: Ctr) -> Any:
    found: dict[str, Any] = {}
    done = c.run("t", "/bin/sh", "-c", "sleep 1000", flags=("-d", "--memory-limit", str(64 << 20)))
    assert done.returncode == 0, done.stderr
    c.wait("t", "RUNNING")
    executed = c("task", "exec", "--exec-id", "e1", "t", "/bin/sh", "-c", "echo inside; exit 5")
    found["exec"] = [executed.returncode, executed.stdout]
    c.must("task", "pause", "t")
    c.wait("t", "PAUSED")
    c.must("task", "resume", "t")
    c.wait("t", "RUNNING")
    found["ps"] = len(c.must("task", "ps", "t").split("\n")) - 1
    metrics = c.must("task", "metrics", "--format", "json", "t")
    found["metrics"] = ["memory" in metrics, "cpu" in metrics, str(64 << 20) in metrics]
    c.must("task", "kill", "--signal", "SIGKILL", "t")
    c.wait("t", "STOPPED")
    removed = c("task", "rm", "t")
    found["task rm"] = removed.returncode
    c.must("container", "rm", "t")
    found["left"] = [
        c.must("task", "ls", "-q"),
        c.must("container", "ls", "-q"),
        [str(path) for path in CGROUPS.glob("default/t")],
    ]
    return found


@contextlib.contextmanager
def containerd() -> Iterator[None]:
    """A containerd of our own, without the plugins nobody asks for here."""
    config = Path("/run/oci-containerd.toml")
    config.write_text(
        'version = 2\nroot = "/mnt/ext4/containerd"\nstate = "/run/oci-containerd"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", '
        '"io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", '
        '"io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.opt"]\n'
        '[grpc]\naddress = "/run/oci-containerd/sock"\n'
    )
    with Path("/run/oci-containerd.log").open("wb") as log:
        process = subprocess.Popen(["containerd", "--config", str(config)], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while subprocess.run(
                ["ctr", "--address", "/run/oci-containerd/sock", "version"], capture_output=True, check=False
            ).returncode:
                assert process.poll() is None, Path("/run/oci-containerd.log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait()


# ----------------------------------------------------------------------------------------------------- the script


def prepare() -> None:
    for name in ("bin", "dev", "etc", "mnt", "proc", "run", "sys", "tmp", "work", "vol", "ro"):
        (ROOTFS / name).mkdir(parents=True, exist_ok=True)
    shutil.copy("/usr/bin/busybox", ROOTFS / "bin" / "busybox")
    for applet in APPLETS.split():
        (ROOTFS / "bin" / applet).symlink_to("busybox")
    (ROOTFS / "plain").write_text("no program\n")
    (ROOTFS / "plain").chmod(0o644)
    (ROOTFS / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
    SCRATCH.chmod(0o755)
    ROOTFS.chmod(0o777)
    (ROOTFS / "tmp").chmod(0o1777)
    # Where it is called from must be reachable for others, too, as an installed runtime is.
    Path(OURS).parent.mkdir(parents=True)
    install(Path(OURS).parent)
    with open("/etc/passwd", "a") as file:
        file.write(f"small:x:{ROOTLESS_UID}:{ROOTLESS_UID}::/mnt/ext4/podman-{ROOTLESS_UID}:/bin/sh\n")
    for name in ("subuid", "subgid"):
        with open(f"/etc/{name}", "a") as file:
            file.write(f"small:{1 << 20}:65536\n")


def install(where: Path) -> None:
    """The runtime as a wheel lays it out: bin and site-packages of one prefix, with this interpreter's version."""
    here = Path(__file__).resolve().parents[2] / "shim" / "agentrun_shim"
    target = where / "agentrun_shim"
    shutil.copytree(here, target, ignore=shutil.ignore_patterns("__pycache__"))
    # The native half looks for the package two directories above itself.
    native = target / "_native" / "agentrun-oci"
    Path(OURS).symlink_to(native)


def step(name: str, runtime: str, function: Callable[[], Any]) -> bool:
    begun = time.monotonic()
    said: dict[str, Any] = {"name": name, "runtime": runtime}
    try:
        said["found"] = function()
    except Exception:  # noqa: BLE001 -- told to whoever reads the line
        said["error"] = traceback.format_exc(limit=-2)
    said["seconds"] = round(time.monotonic() - begun, 1)
    print(json.dumps(said), flush=True)
    return "error" not in said


def suite() -> Any:
    """Every field of a configuration, and the life of a container, where cgroup v2 has its controllers."""
    report = "/run/vm/oci.xml"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--assert=plain", "--tb=short", f"--junit-xml={report}",
        "tests/kernel/test_oci_config.py", "tests/kernel/test_oci_life.py", "tests/kernel/test_oci_rootless.py",
        "tests/kernel/test_oci_storm.py", "tests/kernel/test_oci_odd.py",
    ]  # fmt: skip
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "AGENTRUN_OCI_STORM": "100"}
    done = subprocess.run(command, text=True, capture_output=True, env=env, check=False, timeout=400)
    text = Path(report).read_text()
    cases = re.findall(r'<testcase [^>]*? name="([^"]+)"[^>]*?(?:/>|>(.*?)</testcase>)', text, re.DOTALL)
    found: dict[str, Any] = {"passed": 0, "skipped": []}
    failed = []
    for name, inner in cases:
        if "<failure" in inner or "<error" in inner:
            failed.append(f"{name}: {inner[:1500]}")
        elif "<skipped" in inner:
            found["skipped"].append(name)
        else:
            found["passed"] += 1
    assert done.returncode == 0, "\n".join(failed) or done.stdout[-3000:] + done.stderr[-1000:]
    return found


def systemd() -> Any:
    """Containers in scopes that systemd makes: a real one, PID 1 of a pid namespace of its own."""
    bundle = SCRATCH / "scoped"
    bundle.mkdir()
    (bundle / "rootfs").symlink_to(ROOTFS)
    subprocess.run([OURS, "spec", "--bundle", str(bundle)], check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": ["sleep", "1000"]}
    config["root"]["path"] = str(ROOTFS)
    limits = {"memory": {"limit": 64 << 20}, "pids": {"limit": 30}, "cpu": {"quota": 50000, "period": 100000}}
    config["linux"] |= {"cgroupsPath": "agentrun-t.slice:oci:t1", "resources": limits}
    (bundle / "config.json").write_text(json.dumps(config))
    with booted() as inside:
        with open("/dev/null", "w") as null:
            front = [*inside.front, OURS, "--systemd-cgroup", "create", "--bundle", str(bundle), "t1"]
            done = subprocess.run(front, stdin=null, stdout=null, stderr=null, check=False)
        assert done.returncode == 0
        inside.must(OURS, "--systemd-cgroup", "start", "t1")
        (scope,) = CGROUPS.rglob("oci-t1.scope")
        found: dict[str, Any] = {"path": str(scope.relative_to(CGROUPS))}
        found["files"] = [(scope / file).read_text().strip() for file in ("memory.max", "pids.max", "cpu.max")]
        show = ("systemctl", "show", "oci-t1.scope", "--value", "-p")
        found["unit"] = [
            inside.must(*show, name) for name in ("ActiveState", "Delegate", "MemoryMax", "TasksMax", "CPUQuotaPerSecUSec")
        ]
        inside.must(OURS, "update", "--memory", str(32 << 20), "t1")
        inside.must("systemctl", "daemon-reload")  # it writes what it knows
        found["updated"] = [inside.must(*show, "MemoryMax"), (scope / "memory.max").read_text().strip()]
        inside.must(OURS, "delete", "--force", "t1")
        found["left"] = [inside.must(*show, "ActiveState"), [str(path) for path in CGROUPS.rglob("oci-t1.scope")]]
        found["podman"] = podman_by_systemd(inside)
        return found


def podman_by_systemd(inside: Tool) -> Any:
    """podman's own default. (crun asks systemd by the bus, which is not there: nothing to compare with.)"""
    p = Podman(OURS)
    p.front = [*inside.front, *["systemd" if word == "cgroupfs" else word for word in p.front]]
    limits = ("--memory", "64m", "--cpus", "0.5", "--pids-limit", "30")
    found: list[Any] = [p.shell("cd /sys/fs/cgroup; cat memory.max pids.max cpu.max", *limits).split("\n")]
    where = p.shell("cat /proc/self/cgroup", "--cgroupns", "host", "--cgroup-parent", "my.slice")
    found.append(re.sub("[0-9a-f]{64}", "ID", where))
    codes = [p.run(*argv).returncode for argv in (["sh", "-c", "exit 3"], ["no-such-program"])]
    name = p.start("s", "sleep 1000")
    codes.append(p("exec", "s", "sh", "-c", "exit 5").returncode)
    p.must("update", "--memory", "32m", "s")
    inside.must("systemctl", "daemon-reload")
    found += [codes, [path.read_text().strip() for path in CGROUPS.rglob(f"libpod-{name}.scope/memory.max")]]
    p.must("rm", "-f", "--time", "0", "s")
    found.append([str(path) for path in CGROUPS.rglob(f"libpod-{name}.scope")])
    return found


def jobs() -> list[str]:
    """What this guest does: engines and the suite take as long as each other, so of two kernels each has one of them."""
    kernels, own = os.environ.get("OCI_KERNELS", "").split(), os.environ.get("AGENTRUN_VM", "")
    if len(kernels) < 2 or own not in kernels:
        return ["engines", "suite"]
    return ["suite"] if kernels.index(own) % 2 == 0 else ["engines"]


def main(wanted: list[str]) -> int:
    todo = wanted or jobs()
    good = True
    if "suite" in todo:
        good &= step("suite", "agentrun", suite)
        todo.remove("suite")
    if not todo:
        return 0 if good else 1
    prepare()
    everything = "engines" in todo
    if everything or "systemd" in todo:
        good &= step("systemd", "agentrun", systemd)
    for name, function in PODMAN.items():
        if everything or name in todo:
            for runtime, program in RUNTIMES["podman"].items():
                good &= step(name, runtime, functools.partial(function, Podman(program)))
    if everything or set(todo) & set(CTR):
        with containerd():
            for name, task in CTR.items():
                if everything or name in todo:
                    for runtime, program in RUNTIMES["ctr"].items():
                        good &= step(name, runtime, functools.partial(task, Ctr(program)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
