// Package lazy mounts image layers before their bytes are on the node.
//
// It is the three-method file system (Mount, Check, Unmount) that
// stargz-snapshotter's snapshot package asks for. Mount is called once for each
// layer that containerd prepares, with the labels that containerd hands down:
//
//	labels ─► which layer of which image      (labels.go)
//	       ─► its descriptor, from the manifest (Layers.Describe)
//	       ─► its table of contents, checked   (toc.go)
//	       ─► a tree of files over it          (tree.go)
//	       ─► a FUSE mount                     (mount.go)
//
// A layer that has a table of contents (eStargz, zstd:chunked) is mounted. Every
// other layer makes Mount return an error, and the snapshotter then lets containerd
// unpack it in the ordinary way. Each layer leaves one line in the log that says
// which of the two happened and why.
//
// What is promised: the table of contents is checked against the digest that the
// image manifest names before it is parsed, and every chunk of a file is checked
// against the table before a byte of it is returned. A byte that cannot be had is an
// error of the read (EIO), never a zero. A mount that was lost is made again when
// containerd next asks for it.
//
// The tree and its FUSE operations are stargz-snapshotter's (fs/layer). Its own
// file system (package fs) is not used: that waits 30 seconds for an answer, resolves the
// neighbours of a layer with nothing but their digest, keeps a second copy of what
// it reads on disk and forgets a mount before it is gone. Its layers are
// resolved here one resolver to a mount, which puts all of that in our hands; see
// openTree.
//
// The package knows nothing of registries, peers and stores. It reads through
// Layers.
package lazy
