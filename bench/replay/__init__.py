# SPDX-License-Identifier: Apache-2.0
"""Recorded memory of real agent tasks, replayed by three tenants under one budget: ``python -m bench.replay``.

One tenant has HIGH priority, two have LOW, and together they want 1.12 times what there is, as in AgentCgroup's evaluation
(arXiv 2602.09345). Every triple of tasks runs under each arm, that is, each way to share the budget, in a guest of the VM lane,
because a memory controller is needed.

    __main__.py     host: picks triples, boots guests, keeps what they say
    tasks.py        host: recordings → triples of scaled, compressed time lines and their budget
    guest.py        guest: runs each triple under each arm, prints a JSON line for each
    arms.py         guest: the arms
    allocate.c      guest: the workload, which follows a time line
    figures.py      host: survival, latencies, completion, slow-down, with confidence intervals

The recordings (GPL-2.0) are read where they are and are no part of this repository; nor is what is written to bench/out.
"""
