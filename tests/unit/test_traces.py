# SPDX-License-Identifier: Apache-2.0
"""The table behind the shipped policies' sizes: what it makes of a recording small enough to do by hand."""

import json

import pytest

from bench.traces import LEVELS, main, read_calls

TASK = {
    "run": "one", "model": "haiku-4.5", "cpu": [],
    "mem": [[0, 100.0], [1000, 100.0], [2000, 400.0], [3000, 700.0], [4000, 100.0], [5000, 90.0]],
    "tools": [["Bash", "test", 1500, 3500], ["Bash", "git", 4100, 4200], ["Read", "builtin", 4900, 5100],
              ["Bash", "test", 0, 10]],
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tasks.jsonl"
    lines = [TASK, {**TASK, "model": "other", "run": "two"}, {**TASK, "run": "three", "tools": []}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_what_a_call_took(file):
    test, git, read, first, *others = read_calls(file)
    assert (test.kind, test.seconds, test.rise, test.peak) == ("test", 2.0, 600.0, 700.0)
    # 400 MB from 2 s to 3 s and 700 MB from there to its end at 3.5 s, above 100 MB.
    assert dict(zip(LEVELS, test.above, strict=True)) == {128: 1.5, 256: 1.5, 512: 0.5, 1024: 0, 2048: 0}
    assert (git.seconds, git.rise, git.peak, git.above) == (0.1, None, None, ()), "no sample falls into it"
    assert (read.rise, read.peak) == (-10.0, 90.0)
    assert first.rise is None, "there is nothing before it to rise from"
    assert [call.seconds for call in others] == [None] * 4, "another model's durations are not to be trusted"
    assert others[0].rise == 600.0


def test_the_tables(file, capsys):
    main([str(file)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["tests", "4", "1.00", "1.90", "2.00", "2", "600", "600", "600", "700"] in rows
    assert ["git", "2", "0.10", "0.10", "0.10", "0", "-", "-", "-", "-"] in rows
    assert ["512 MB", "2", "0", "0"] in rows
    assert ["3", "700", "700", "700"] in rows


def test_what_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="No such file"):
        main([str(tmp_path / "nope")])
