"""The files in the sandbox's /etc that decide how names are looked up. Somebody else mounts them."""

from __future__ import annotations


def resolv_conf() -> bytes:
    """/etc/resolv.conf: our resolver, and no search list, so that a name is asked for as it was written.

    127.0.0.1 and not the sandbox's other address: it is the one every resolver library takes without question. Not ``search .``:
    musl makes of it a name that is none, and waits five seconds. So a host name with a dot still gives glibc a search list.
    """
    return b"# agentrun: only names the policy allows resolve here\nnameserver 127.0.0.1\noptions ndots:1\n"


def hosts(hostname: str = "sandbox") -> bytes:
    """/etc/hosts: the sandbox itself. The host's own file must not be seen.

    Libraries ask it before DNS, so a name in it would be connected to by its real address, which is refused.
    """
    return f"127.0.0.1 localhost {hostname}\n::1 localhost {hostname} ip6-localhost ip6-loopback\n".encode()
