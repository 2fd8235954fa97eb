"""The probes process: the only one that imports ``bcc``.

It compiles the programs of ``bpf/``, attaches what this kernel takes, hands the descriptors of their maps to whoever started
it, and holds the attachments until it is told to stop, dies, or its socket closes. Nothing of a tool call passes through it.
"""
