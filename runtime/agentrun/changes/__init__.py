"""What a call changed in a copy-on-write workspace: kept beside the original, looked at, applied or thrown away.

::

    beneath   files below a held directory, never through a link nor out of it: openat2(2), renameat2(2)
    nodes     one entry of a tree as it is on disk; whether two are the same
    model     a change set: entry by entry, what was there and what is there now
    layered   several overlay layers seen as one: what is in a directory, what is hidden
    scan      layers and the base below them → the changes
    units     changes → what is applied as one: a file, a tree that came, a tree that went
    check     whether the base is still what the changes were made to
    build     a new file or tree, made aside
    leftovers what an applying that was killed left beside a unit's place
    apply     units → the base, each atomically; killed anywhere, it can be run again
    patch     changes as text, for people
    mount     the overlay of a workspace
    store     what is on disk: change sets, who owns them, who is at work on one
    draft     a change set while its call runs
    client    change sets as the command line gets at them: the store's for root, the daemon's for others

``scan`` and ``apply`` take descriptors and know neither the store nor sandboxes.
"""
