"""Images: root file systems that calls share, extracted once, named by what is in them.

::

    limits       how much an archive may come to, and how it is refused
    tarstream    bytes → entries, strictly                          streams   blobs → checked, uncompressed bytes
    manifest     what a layer has to be on disk; reads it back      programs  zstd, skopeo, mmdebstrap: not Python
    tree         writes one layer, never through a link
    archive      entries → tree; whiteouts                          copying   a host directory → tree
    config       what an image says about how its programs are run
    layers       one layer: where it comes from, and building it
    recipe       what an image that is built here consists of     aptsources   where this machine has Debian packages from
    build        a recipe → a layer and a config
    sources      a path or a reference → layers and config (``oci``, ``tarfiles``: the formats)
    locks        flock: the store, a layer being built, a place to build in, a lease
    shelf        what is on disk: layers, images and names; nothing here decides who may remove what
    keeper       the locks, put to those files
    verify       what is on disk against what it has to be
    store        import, lease, remove, prune

Nothing here knows of sandboxes; who mounts layers takes a lease (``store``).
"""
