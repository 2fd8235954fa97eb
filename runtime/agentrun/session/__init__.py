"""Sessions: a root and a workspace that stay from call to call, with snapshots, forks and rollbacks.

A session is a stack of overlay layers above an image and above a workspace's directory. Calls write to the topmost. A snapshot
puts an empty one on top, so what is below does not change any more; a fork is another stack of the same layers; a rollback puts
an empty layer on those of a snapshot. Nothing is ever copied, so each takes as long as making a few directories::

    model     what a session is made of
    shelf     the files of a store, and its lock
    holds     who uses a session: a lock for each
    layers    where calls write, and wrote
    directory, images    what is below: the workspace's directory, the image
    store     what is done with sessions
    review    what its workspace has that its directory has not
    mount     a session's layers → the root of a sandbox, and its workspace
"""
