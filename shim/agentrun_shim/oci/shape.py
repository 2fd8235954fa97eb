"""The types of a configuration: what everything else takes for granted of the values that it reads.

The runtime specification's JSON schema (schema/config-*.json), as far as it is about types; ``null`` is as good as nothing, for
that is how Go writes an empty list. What is not named here is not read, or is looked at closely by whoever reads it.
"""

from __future__ import annotations

from agentrun_shim.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TEXT, NUMBER, YES_NO = "a string", "a whole number", "true or false"
TEXTS, NUMBERS = [TEXT], [NUMBER]
TEXT_BY_NAME: dict[str, Any] = {"*": TEXT}
_MAPS = [{"containerID": NUMBER, "hostID": NUMBER, "size": NUMBER}]
_HOOKS = [{"path": TEXT, "args": TEXTS, "env": TEXTS, "timeout": NUMBER}]
_DEVICE = [{"major": NUMBER, "minor": NUMBER, "rate": NUMBER, "weight": NUMBER}]
PROCESS: dict[str, Any] = {
    "args": TEXTS, "env": TEXTS, "cwd": TEXT, "terminal": YES_NO, "consoleSize": {"height": NUMBER, "width": NUMBER},
    "user": {"uid": NUMBER, "gid": NUMBER, "umask": NUMBER, "additionalGids": NUMBERS},
    "capabilities": {"bounding": TEXTS, "effective": TEXTS, "permitted": TEXTS, "inheritable": TEXTS, "ambient": TEXTS},
    "rlimits": [{"type": TEXT, "soft": NUMBER, "hard": NUMBER}], "noNewPrivileges": YES_NO, "oomScoreAdj": NUMBER,
    "apparmorProfile": TEXT, "selinuxLabel": TEXT, "ioPriority": {"class": TEXT, "priority": NUMBER},
    "scheduler": {"policy": TEXT, "nice": NUMBER, "priority": NUMBER, "flags": TEXTS, "runtime": NUMBER, "deadline": NUMBER,
                  "period": NUMBER},
    "execCPUAffinity": {"initial": TEXT, "final": TEXT},
}  # fmt: skip
RESOURCES: dict[str, Any] = {
    "devices": [{"allow": YES_NO, "type": TEXT, "major": NUMBER, "minor": NUMBER, "access": TEXT}],
    "memory": {"limit": NUMBER, "reservation": NUMBER, "swap": NUMBER, "kernel": NUMBER, "kernelTCP": NUMBER,
               "swappiness": NUMBER, "disableOOMKiller": YES_NO},
    "cpu": {"shares": NUMBER, "quota": NUMBER, "burst": NUMBER, "period": NUMBER, "realtimeRuntime": NUMBER,
            "realtimePeriod": NUMBER, "cpus": TEXT, "mems": TEXT, "idle": NUMBER},
    "pids": {"limit": NUMBER},
    "blockIO": {"weight": NUMBER, "leafWeight": NUMBER, "weightDevice": _DEVICE, "throttleReadBpsDevice": _DEVICE,
                "throttleWriteBpsDevice": _DEVICE, "throttleReadIOPSDevice": _DEVICE, "throttleWriteIOPSDevice": _DEVICE},
    "hugepageLimits": [{"pageSize": TEXT, "limit": NUMBER}],
    "network": {"classID": NUMBER, "priorities": [{"name": TEXT, "priority": NUMBER}]},
    "rdma": {"*": {"hcaHandles": NUMBER, "hcaObjects": NUMBER}}, "unified": TEXT_BY_NAME,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "ociVersion": TEXT, "hostname": TEXT, "domainname": TEXT, "annotations": TEXT_BY_NAME,
    "root": {"path": TEXT, "readonly": YES_NO}, "process": PROCESS,
    "mounts": [{"destination": TEXT, "type": TEXT, "source": TEXT, "options": TEXTS, "uidMappings": _MAPS, "gidMappings": _MAPS}],
    "hooks": dict.fromkeys(
        ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"), _HOOKS
    ),
    "linux": {
        "namespaces": [{"type": TEXT, "path": TEXT}], "uidMappings": _MAPS, "gidMappings": _MAPS, "cgroupsPath": TEXT,
        "timeOffsets": {"*": {"secs": NUMBER, "nanosecs": NUMBER}}, "sysctl": TEXT_BY_NAME, "resources": RESOURCES,
        "devices": [{"path": TEXT, "type": TEXT, "major": NUMBER, "minor": NUMBER, "fileMode": NUMBER, "uid": NUMBER,
                     "gid": NUMBER}],
        "seccomp": {"defaultAction": TEXT, "defaultErrnoRet": NUMBER, "architectures": TEXTS, "flags": TEXTS,
                    "listenerPath": TEXT, "listenerMetadata": TEXT,
                    "syscalls": [{"names": TEXTS, "action": TEXT, "errnoRet": NUMBER,
                                  "args": [{"index": NUMBER, "value": NUMBER, "valueTwo": NUMBER, "op": TEXT}]}]},
        "rootfsPropagation": TEXT, "maskedPaths": TEXTS, "readonlyPaths": TEXTS, "mountLabel": TEXT,
        "personality": {"domain": TEXT, "flags": TEXTS}, "memoryPolicy": {"mode": TEXT, "nodes": TEXT, "flags": TEXTS},
    },
}  # fmt: skip


def check(value: Any, shape: Any, where: str) -> None:
    """Raise OciError for the first value in ``value`` that is not of the type ``shape`` has for it."""
    if value is None:
        return
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise OciError(f"{where or 'the configuration'}: {value!r:.60} is not an object")
        every = shape.get("*")
        for name, item in value.items():
            wanted = shape.get(name, every)
            if wanted is not None:
                check(item, wanted, f"{where}.{name}" if where else name)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise OciError(f"{where}: {value!r:.60} is not a list")
        (wanted,) = shape
        for number, item in enumerate(value):
            if item is None:
                raise OciError(f"{where}[{number}]: there is nothing")
            if wanted is not TEXT or type(item) is not str or "\0" in item:  # most there is are strings: no call for those
                check(item, wanted, f"{where}[{number}]")
    elif shape is TEXT:
        if not isinstance(value, str) or "\0" in value:
            raise OciError(f"{where}: {value!r:.60} is not {TEXT}{' without NUL' if isinstance(value, str) else ''}")
    elif isinstance(value, bool) is not (shape is YES_NO) or not isinstance(value, int):
        raise OciError(f"{where}: {value!r:.60} is not {shape}")
