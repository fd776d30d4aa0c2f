// Package erofs turns the tree of a layer into an EROFS image and mounts it.
//
// # What is made
//
// A layer on this node is two files. The data file holds the contents of the regular
// files, each from a multiple of 4 KiB on; it may be there in full, or be served while
// it fills. The metadata image, which this package writes, holds all the rest: names,
// attributes, extended attributes, link targets, and for each regular file the block of
// the data file where its contents begin. The kernel mounts the two together, so that
// lookup, stat, readdir and every read of what is cached never leave it.
//
// The image is, block after block:
//
//	superblock, with the slot of the one extra device    at 1024 and 1152
//	inodes in the order of the entries, each followed by its extended attributes and,
//	    of a directory or symbolic link, by the last part of its contents when short
//	the other blocks of directories and long symbolic links
//
// The data file has its place in the address space of blocks right behind the image
// (its "mapped block address"). A regular file then is the plainest that EROFS knows: a
// first block and a size, one extent however large, nothing in the image but 64
// bytes of inode. Chunk indexes would cost half as much again for each file and say
// the same. It also means that the image with the data file appended to it is itself a
// complete EROFS image, which any tool that knows the format can read.
//
// Hard links are one inode with several names. The kernel takes the inode number from the
// inode's place in the image, so that links are the same file to everything that asks.
//
// # What is promised
//
// The same entries give the same bytes. Writing takes memory for the plan (some tens of
// bytes for each entry) and one buffer, not for the image. What the format cannot hold,
// and entries that are not in the order of index.Index, are refused with a sentence
// that names the entry, before the first byte is written; whatever the entries are,
// Plan neither panics nor writes an image that the kernel would find corrupt.
//
// Nothing in the image depends on a kernel newer than Linux 5.16, the first that has
// extra devices.
//
// # Mounting
//
// Since Linux 6.12 the kernel mounts an image from a plain file. Before that, or where
// it is configured away, the two files go behind loop devices. Probe tries both, with
// an image of its own and overlayfs above, because neither a version number nor a
// configuration tells whether it works in a given folder: the metadata file must not
// lie on overlayfs, and some kernels count the file systems that are stacked.
//
// A mount has nodev and nosuid. Whiteouts are recognised by their inode and devices
// and setuid files are judged by the mount that they are reached through, which is that of
// overlayfs; so layers work, and nobody on the host gets at them beside the container.
//
// EROFS takes a data file that ends early for one that goes on with zeros. Mount
// therefore refuses a data file that is shorter than its image says; whoever serves it
// must answer every read in full or with an error.
package erofs
