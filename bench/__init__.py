"""The benchmarks: ``python -m bench`` (``make bench``) measures agentrun beside what it replaces. bench/README.md tells how."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if importlib.util.find_spec("agentrun") is None:  # a checkout that was not installed
    sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "shim")]
