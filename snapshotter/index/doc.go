// Package index says what is in an image layer and where, so that any part of it can
// be had without unpacking all of it.
//
// # Three coordinates
//
// A layer is a tar, mostly compressed. An Index connects three ways to count its bytes: the
// blob, as it lies in a registry; the stream, which the blob decodes to; and the data
// file, which has the contents of the regular files one after another, each at a multiple
// of Align, as the device of an EROFS image wants them. Extents lead from the data file to
// the stream, Points from the stream to the blob. What can be present or absent, and
// is checked by its SHA-256, is a Chunk of the data file.
//
// # The life of an index
//
// Build makes it while it reads a layer from front to back, once: the same pass checks
// the blob's digest, finds the diff ID and can write the data file, so that unpacking a
// layer and indexing it are one thing. Encode and Decode carry it to other nodes, and
// whoever has it can Fill chunks from ranges of the blob. FromEStargz and FromZstdChunked make
// one from the table of contents that a layer brings along; there the stream is only
// what the table names, the diff ID is not known, and chunks are the table's own.
//
// An index is bound to its blob by Blob, but it is no proof that the blob has these
// contents: it is trusted as far as whoever made it. Fill makes sure that what it hands out
// is what the index promised.
//
// # Beginning in the middle
//
// A gzip stream has no places to begin at, but nearly: a DEFLATE block refers to at most
// 32 KiB before it and needs nothing else. A Point within a member keeps these bytes, its
// window. Most of them are never referred to; Build notes which are, and has zeros
// for the others, so that the windows compress well. A member's own begin needs no
// window, nor does a zstd frame's. A zstd layer of a single frame, as most are, has one
// point: it can be filled, but each time from its begin. In a tar decoding can begin
// anywhere, whatever its one point says.
//
// The decoder here is the package's own, because one that can stop between blocks and
// begin between bits is needed; it is about twice as fast as compress/flate's, and it refuses
// what that refuses (the fuzz target compares both).
//
// # The tree
//
// Entries are what containerd's archive.Apply would leave in an overlay's upper directory:
// a later entry replaces an earlier one, directories merge, names are contained in the root
// through ".." and links alike, whiteouts become devices 0:0 and opaque marks an attribute.
// What Apply refuses is refused with ErrNotIndexable, which tells the caller to hand the
// layer to containerd. There is one difference: a directory that the layer only implies
// would get the attributes of the layer below, which an index cannot know; it is
// marked Implicit.
//
// # Errors and hostile input
//
// ErrNotIndexable says that the layer is right but cannot be indexed, ErrChunk that blob
// and index do not agree; all other errors are of reading, writing or the context. Everything
// that is read here may come from anybody: limits.go has the bounds on what is believed, and
// Validate the rules that hold for every index that the package returns.
//
// An Index does not change once it is made, and its methods may be called by many at once.
package index
