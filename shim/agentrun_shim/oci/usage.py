"""--version and --help."""

from __future__ import annotations

from agentrun_shim.oci.names import SPEC_VERSION, VERSION
from agentrun_shim.oci.options import GLOBAL, VERBS, Options

_VERBS = {
    "create": "make a container from a bundle; it waits for start", "start": "run the program of a created container",
    "run": "create, start, wait, delete", "state": "the state of a container, as JSON", "kill": "send a signal to a container",
    "delete": "remove a container that has stopped", "exec": "run one more program in a container, in a leaf of its own",
    "ps": "the processes of a container", "list": "all containers", "pause": "freeze a container", "resume": "thaw it",
    "update": "change limits", "events": "usage, and the kernel's kills", "spec": "write a config.json to begin with",
    "features": "what this runtime can do, as JSON",
}  # fmt: skip


def show(options: Options) -> int:
    """Print what was asked for. Without a verb that is an error."""
    if "version" in options:
        print(f"agentrun-oci version {VERSION}\ncommit: agentrun-{VERSION}\nspec: {SPEC_VERSION}")
        return 0
    if options.verb in VERBS:
        print(f"usage: agentrun-oci {options.verb} [FLAG...]{'' if options.verb in ('list', 'spec', 'features') else ' ID'}\n")
        print(f"{_VERBS[options.verb]}\n")
        known = VERBS[options.verb]
    else:
        print("usage: agentrun-oci [FLAG...] COMMAND [FLAG...] [ID] [ARGUMENT...]\n\nAn OCI runtime.\n")
        print("".join([f"  {verb:<10} {text}\n" for verb, text in _VERBS.items()]))
        known = GLOBAL
    print("".join([f"  --{name}{'' if kind == 'flag' else ' VALUE'}\n" for name, kind in known.items()]), end="")
    return 0 if "help" in options else 1
