"""Memory bursts: who is above its steady budget, what it has left, and what is done about it.

::

    bpf/*.c      in the kernel: see each charge, keep the bucket, strike            (loaded by agentrun.probes)
    table        the leaves both sides know, in memory that both sides see
    link         the probes process: start it, take its maps, start it again
    ladder       pure: a leaf's situation → what to do
    governor     applies it: memory.high, freeze, kill; and keeps the record that goes into the result
"""
