"""The cgroup v2 tree: where leaves live, what may be written to them, what they tell.

Everything goes through a held directory descriptor (a removed and recreated cgroup of the same name is another one), and
the root is a parameter, so a test can hand in any directory tree.
"""
