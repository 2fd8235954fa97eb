"""The boundary side of agentrun: what crosses into the sandbox, and what is on the other side of it.

Rules of this package: synchronous, single-threaded, standard library and msgspec only; it never imports trio, pyroute2 or
``agentrun`` (tests/unit/test_layers.py enforces it). ``native/`` beside it holds the C programs; ``plan`` is the one
definition of what is said to them.
"""
