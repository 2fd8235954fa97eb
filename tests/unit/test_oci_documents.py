# SPDX-License-Identifier: Apache-2.0
"""features, state and configurations against the runtime specification's own JSON schemas, as Debian packages them."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import referencing
import referencing.jsonschema

from agentrun_shim.oci import names, seccomp_words
from agentrun_shim.oci.config import Linux
from agentrun_shim.oci.documents import example, feature_document
from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.jsontext import dumps, loads
from agentrun_shim.oci.process import Process
from tests.requirements import lacking

SCHEMAS = Path("/usr/share/gocode/src/github.com/opencontainers/runtime-spec/schema")
HERE = Path(__file__).parent


def schema(name: str) -> jsonschema.Draft4Validator:
    if not SCHEMAS.is_dir():
        lacking("no schemas (apt-get install golang-github-opencontainers-specs-dev)")

    def retrieve(uri: str) -> referencing.Resource:
        found = json.loads((SCHEMAS / uri).read_text())
        return referencing.Resource.from_contents(found, default_specification=referencing.jsonschema.DRAFT4)

    registry = referencing.Registry(retrieve=retrieve)
    return jsonschema.Draft4Validator(json.loads((SCHEMAS / name).read_text()), registry=registry)


@pytest.mark.parametrize("rootless", [False, True])
def test_the_example_is_a_configuration(rootless):
    schema("config-schema.json").validate(example(rootless=rootless))


def full() -> dict:
    """Every field that the schema of Debian's version has and that this runtime takes."""
    made = copy.deepcopy(example())
    made["process"] |= {
        "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]}, "oomScoreAdj": 10, "selinuxLabel": "",
        "apparmorProfile": "",
        "consoleSize": {"height": 1, "width": 2},
    }  # fmt: skip
    made |= {
        "domainname": "d",
        "annotations": {"a": "b"},
        "hooks": {"prestart": [{"path": "/x", "args": ["x"], "env": ["A=b"], "timeout": 1}]},
    }
    made["linux"] |= {
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 2, "fileMode": 438, "uid": 0, "gid": 0}],
        "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}], "gidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
        "cgroupsPath": "/x", "rootfsPropagation": "slave", "mountLabel": "", "sysctl": {"kernel.msgmax": "1"},
        "personality": {"domain": "LINUX"},
        "resources": {
            "devices": [{"allow": False, "type": "a", "access": "rwm"}], "memory": {"limit": 1 << 20, "swap": 1 << 21,
            "reservation": 1 << 19},
            "cpu": {"shares": 5, "quota": 1000, "period": 1000, "cpus": "0", "mems": "0"}, "pids": {"limit": 5},
            "blockIO": {"weight": 10, "throttleReadBpsDevice": [{"major": 1, "minor": 2, "rate": 3}]},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 5}], "rdma": {"mlx": {"hcaHandles": 1, "hcaObjects": 2}},
            "unified": {"memory.high": "1"},
        },
        "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "listenerPath": "/s", "listenerMetadata": "m",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [{"index": 0, "value": 1,
            "valueTwo": 2, "op": "SCMP_CMP_EQ"}]}],
        },
    }  # fmt: skip
    return made


def test_what_is_taken_is_what_the_schema_takes():
    made = full()
    schema("config-schema.json").validate(made)
    Linux(made)
    Process(made["process"])


def test_state():
    head = {
        "ociVersion": "1.3.0",
        "id": "x",
        "bundle": "/b",
        "rootfs": "/b/r",
        "created": "now",
        "owner": "",
        "annotations": {"a": "b"},
    }
    for status in ("creating", "created", "running", "stopped"):
        schema("state-schema.json").validate(json.loads(f'{dumps(head)[:-1]},"pid":5,"status":"{status}"}}'))


def test_features():
    """Debian's version of the specification is older than features.md; what that says is in a file of ours."""
    facts = json.loads((HERE / "oci_features_schema.json").read_text())
    document = loads(dumps(feature_document()).encode(), "features")
    jsonschema.Draft202012Validator(facts).validate(document)
    assert set(document["linux"]["namespaces"]) == set(names.NAMESPACES)
    assert {"rro", "idmap", "tmpcopyup", "rbind", "rprivate"} <= set(document["mountOptions"])
    assert "SCMP_ACT_NOTIFY" in seccomp_words.ACTIONS
    assert document["ociVersionMin"] <= "1.0.0" < document["ociVersionMax"]


def test_a_version_of_another_major_is_not_taken(tmp_path):
    from agentrun_shim.oci.config import load

    path = tmp_path / "config.json"
    path.write_text(json.dumps({**example(), "ociVersion": "2.0.0"}))
    with pytest.raises(OciError, match="is no version 1"):
        load(str(path))
