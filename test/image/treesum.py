#!/usr/bin/python3
"""Prints one SHA-256 over every file of this container's root: path, kind, mode, owner, time and content.

Left out is what a runtime mounts or makes itself, and the entries that lazy formats add to a layer's root.
The Go function TreeSum of the test package computes the same from an image's layers."""
import hashlib
import os
import stat

SKIP = {
    b"dev", b"proc", b"sys", b"run", b".dockerenv", b"etc/hostname", b"etc/hosts", b"etc/resolv.conf", b"etc/mtab",
    b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark",
}


def lines(root, prefix):
    for name in sorted(os.listdir(root + b"/" + prefix)):
        path = prefix + name
        if path in SKIP:
            continue
        full = root + b"/" + path
        st = os.lstat(full)
        kind, mode = stat.S_IFMT(st.st_mode), stat.S_IMODE(st.st_mode)
        owner = b"%d:%d" % (st.st_uid, st.st_gid)
        if kind == stat.S_IFDIR:
            yield b"dir %o %s %s" % (mode, owner, path)
            yield from lines(root, path + b"/")
        elif kind == stat.S_IFLNK:
            yield b"link %s %s %s" % (owner, os.readlink(full), path)
        elif kind == stat.S_IFREG:
            digest = hashlib.sha256()
            with open(full, "rb") as f:
                while chunk := f.read(1 << 20):
                    digest.update(chunk)
            yield b"file %o %s %d %d %s %s" % (mode, owner, st.st_mtime_ns // 10**9, st.st_size, digest.hexdigest().encode(), path)
        else:
            yield b"other %o %s %s" % (mode, owner, path)


total, count = hashlib.sha256(), 0
for line in lines(b"", b""):
    total.update(line + b"\n")
    count += 1
print(f"{total.hexdigest()} {count}", flush=True)
