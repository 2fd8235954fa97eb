# SPDX-License-Identifier: Apache-2.0
"""The daemon's configuration: what is read, and that what is wrong is named with its file and key."""

import re
from pathlib import Path

import msgspec
import pytest

from agentrun.config import DaemonConfig, TenantConfig, executor_config, load_config
from agentrun.errors import UsageError
from agentrun.policy import GIB, Limits
from agentrun.tomltext import write_value

GOOD = """
socket = "/run/x.sock"
group = "agents"
max_running = 8
max_queued = 0
pool_least = 0
pool_most = 1
metrics = "127.0.0.1:9464"

[tenants.ci]
memory = "4G"
pids = 100
cpus = 1.5
cpu_weight = 50
uids = [1000, 1001]

[tenants."a.b"]
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_key(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert config == DaemonConfig(
        socket="/run/x.sock", group="agents", max_running=8, max_queued=0, pool_least=0, pool_most=1, metrics="127.0.0.1:9464",
        tenants={
            "ci": TenantConfig(memory="4G", pids=100, cpus=1.5, cpu_weight=50, uids=[1000, 1001]),
            "a.b": TenantConfig(),
        },
    )  # fmt: skip
    executor = executor_config(config, "name")
    assert (executor.name, executor.max_running, executor.max_queued) == ("name", 8, 0)
    assert (executor.pool_least, executor.pool_most) == (0, 1)
    assert executor.tenant_limits == {
        "ci": Limits(memory_max=4 * GIB, memory_swap_max=None, pids_max=100, cpus=1.5, cpu_weight=50),
        "a.b": Limits(memory_max=None, memory_swap_max=None, pids_max=None),
    }


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == DaemonConfig()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("scoket = '/x'", "scoket"),
        ("max_running = 'many'", "max_running"),
        ("max_running = 0", "max_running"),
        ("max_running = 1.5", "max_running"),
        ("max_queued = -1", "max_queued"),
        ("pool_most = 0", "pool_most"),
        ("pool_least = -1", "pool_least"),
        ("group = 5", "group"),
        ("[tenants.ci]\nmemroy = '4G'", "memroy"),
        ("[tenants.ci]\nmemory = 4", "memory"),
        ("[tenants.ci]\nmemory = 'lots'", "tenants.ci.memory: 'lots'"),
        ("[tenants.ci]\nuids = ['root']", "uids"),
        ("[tenants.'a/b']", "tenant: 'a/b'"),
        ("[tenants.'..']", "tenant: '..'"),
        ("max_running = ", "config.toml"),
        ("a = 1\na = 2", "config.toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, what):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert what in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_config(tmp_path / "none.toml")
    assert str(caught.value) == f"{tmp_path}/none.toml: No such file or directory"
    with pytest.raises(UsageError, match=f"^{tmp_path}: Is a directory$"):
        load_config(tmp_path)


def test_a_file_that_is_not_text(tmp_path):
    path = write(tmp_path, b'socket = "\xff"')
    with pytest.raises(UsageError, match=f"^{path}: "):
        load_config(path)


@pytest.mark.parametrize(
    "line",
    ["pids = 0", "pids = -1", "cpus = 0", "cpus = -1.0", "cpus = nan", "cpus = inf", "cpu_weight = 0", "cpu_weight = 10001"],
)
def test_a_budget_no_cgroup_can_have_is_refused(tmp_path, line):
    path = write(tmp_path, f"[tenants.ci]\n{line}")
    with pytest.raises(UsageError, match=f"^{path}: .*{line.split()[0]}"):
        load_config(path)


def test_more_least_than_most_is_refused(tmp_path):
    path = write(tmp_path, "pool_least = 9\npool_most = 8")
    with pytest.raises(UsageError, match=f"^{path}: .*pool_least"):
        load_config(path)


# ---------------------------------------------------------------- docs/config.md


DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "config.md").read_text()


def keys() -> dict[str, object]:
    """Every key with its default, as TOML has it; None where there is none."""
    own = {field.name: field.default for field in msgspec.structs.fields(DaemonConfig) if field.name != "tenants"}
    return own | {f"tenants.NAME.{name}": getattr(TenantConfig(), name) for name in TenantConfig.__struct_fields__}


def test_the_documentation_has_every_key_with_its_default():
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCUMENTATION.splitlines() if line.startswith("| `")]
    rows = {row[0].strip("`"): row[2] for row in cells}
    assert rows == {key: "" if default is None else f"`{write_value(default)}`" for key, default in keys().items()}
    assert all(len(row) == 4 and row[1] and row[3] for row in cells)


def test_the_documented_example_loads(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", DOCUMENTATION, re.DOTALL)
    config = load_config(write(tmp_path, example))
    assert config.tenants["ci"] == TenantConfig(memory="16G", cpus=4.0, uids=[998])
