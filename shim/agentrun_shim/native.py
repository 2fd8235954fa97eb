"""Find, and when developing build, the native programs.

The wheel carries them in ``agentrun_shim/_native``. The build backend compiles them with ``build`` below, and so does
``python -m agentrun_shim.native`` in a checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from agentrun_shim import plan

DIRECTORY = Path(__file__).parent / "_native"
SOURCES = {
    "agentrun-slot": (
        *("zygote.c", "plan.c", "template.c", "init.c", "runner.c", "rights.c", "landlock.c", "shared.c", "start.c"),
    ),
    "agentrun": ("client*.c", "start.c"),
    "agentrun-oci": ("oci_*.c", "shared.c", "rights.c", "start.c"),
}
CFLAGS = (
    *("-std=c11", "-Os", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none"),
    *("-Wl,-z,noexecstack", "-Wl,--build-id=none", "-s"),
)


def slot_program() -> str:
    """The path of the zygote/init/runner program.

    Raises:
        FileNotFoundError: it was never built.
    """
    path = DIRECTORY / "agentrun-slot"
    if not path.exists():
        raise FileNotFoundError(2, "the native slot is not built (make build, or reinstall the package)", str(path))
    return str(path)


def build(sources: Path, into: Path = DIRECTORY) -> list[Path]:
    """Compile every program of ``sources`` (shim/native) into ``into``; needs a C compiler and the kernel's headers.

    Raises:
        RuntimeError: there is no compiler.
        subprocess.CalledProcessError: it refused.
    """
    cc = shutil.which(os.environ.get("CC", "cc"))
    if cc is None:
        raise RuntimeError("no C compiler (cc) to build agentrun's native programs with (apt-get install gcc libc6-dev)")
    into.mkdir(parents=True, exist_ok=True)
    (into / "plan.h").write_text(plan.c_header())
    built = []
    for name, patterns in SOURCES.items():
        files = sorted(file for pattern in patterns for file in sources.glob(pattern))
        target, scratch = into / name, into / f".{name}.{os.getpid()}"
        subprocess.run([cc, *CFLAGS, f"-I{into}", "-o", str(scratch), *map(str, files)], check=True)
        scratch.rename(target)  # a running program is replaced, never written to
        built.append(target)
    return built


if __name__ == "__main__":
    for program in build(Path(__file__).parents[1] / "native"):
        print(program, program.stat().st_size)
