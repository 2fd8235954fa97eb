"""``net = "egress"``: a tool reaches the names and ports its policy lists, through relays of ours, and nothing else.

docs/network.md has the whole path; ``path.EgressPath`` is the one object the rest of agentrun uses.
"""
