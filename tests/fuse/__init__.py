"""A file system of the tests' own, mounted by FUSE: the mounts that people save to, with what those refuse.

It speaks to /dev/fuse itself, so that nothing but the kernel and the right to mount is asked for.

* ``places`` says what it refuses: Mountpoint for S3, HDFS and others, as their documentation has them.
* ``files`` is the file system, in memory.
* ``wire`` is the kernel's protocol, as far as it is needed; ``python -m tests.fuse.wire`` serves one mount.
* ``mounted`` mounts it, in a process of its own.
"""
