"""The OCI runtime ``agentrun-oci``: what needs config.json. The plain verbs are native (``shim/native/oci_*.c``).

An engine starts a runtime several times for every container, so this package keeps Python's start-up short: the standard
library's small modules only (no re, enum, typing, subprocess, argparse, socket or json), the rest where it is used.
"""
