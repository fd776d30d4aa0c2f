// Package layerstore keeps the layers of images on this node in the one form in
// which containers read them, whether a layer is all there or not at all yet.
//
// # What a layer is
//
// An EROFS metadata image, and a data file that holds the contents of its regular
// files one after another. The data file has its full length from the start; it is
// cut into chunks, each of which is present or absent. An eager layer is one whose
// chunks are all present: [Store.Unpack] makes it from the blob's bytes in one pass.
// A lazy layer ([Store.Create]) begins with none, and [Layer.ReadAt] decodes what is
// asked for out of the blob that [Layer.SetSource] names. Both are the same on disk
// and the first turns into the second by [Layer.Complete].
//
// # What it promises
//
//   - A byte is handed out only when it lies in a chunk whose SHA-256 was found to be
//     the one in the index. A missing byte is waited for, or the read fails: never
//     zeros, never a short read.
//   - A layer is there or it is not: it is made aside and comes by one rename.
//   - No chunk counts as present over wrong data, also after the power failed. kill -9
//     loses no chunk; a power failure loses at most the last flushEvery of them.
//   - A layer that somebody holds open is never evicted.
//   - A layer that cannot be restored is reported and set aside, and harms no other.
//
// It knows nothing of registries, snapshots or mounts, nor of compressions: package
// index decodes, the function in [Options.Meta] makes the metadata image.
//
// # The life of a read
//
// A read of present chunks looks at the bitmap and is one pread(2). Anything else
// joins or starts a run: one decoder that goes forward through the layer from a place
// where decoding can begin, keeps and hands out every chunk that it passes, and stops
// at its limit. A reader who goes on where he stopped moves that limit ahead of
// himself, by a window that doubles as the kernel's does, so a layer that is read
// from one end to the other is decoded once, by one run, as fast as the blob arrives.
// A run at its limit waits a moment for the reader to return (a decoder that is
// where the reader is saves decoding what lies between it and the last such place).
// A run that nobody waits for any more, because its readers gave up, is cancelled.
//
// Reads have a [Priority]. A [Demand] read that needs a chunk
// that a slower run is about to decode makes that run one of demand. Runs of
// [Background] pause while a demand read waits anywhere in the store.
//
// # Presence and crashes
//
// The file "present" holds two bitmaps. A chunk's bit in the second is written as soon
// as the chunk is, and counts as long as the machine stays up: the page cache
// outlives any process, and the file names the boot it was written in. The bit in the
// first is written after an fdatasync(2) of the data returned, and counts for ever.
// Bits are only ever added to the first, so whatever part of it reached the disk is
// true. This costs one fdatasync per flushEvery or flushBytes (11 ms for 16 MiB here)
// instead of one per chunk (2 ms for 256 KiB), and nothing has to be read and hashed
// again when a store is opened.
//
// # On disk
//
//	lock                            flock: one process owns the store
//	layers/<algorithm>-<hex>/layer  what the layer is; its mtime is the time of last use
//	                        /index  the encoded index
//	                        /meta.erofs
//	                        /data   sparse, its full length from the start
//	                        /present
//	                        /complete  empty; there once all of data was checked and synced
//	                        /order  what its first reader read, in order
//	                        /refined  the index with that order in it, for other nodes
//	new/                            being made; emptied by Open
//	broken/                         could not be restored; emptied by the next Open
//	trash/                          on its way out; emptied by Open
//
// Files have mode 0600, folders 0700. The store is for local file systems with sparse
// files.
//
// # Errors
//
// [ErrNoSpace] when the disk is full, after what nobody uses was evicted; the next read tries
// again. A full quota is one too, but not for reads with [Demand]. [ErrCorrupt] when the blob's bytes do not decode to what
// the index says, after they were fetched again. What the source answers is tried again
// for [Options.Patience], within the reader's context.
package layerstore
