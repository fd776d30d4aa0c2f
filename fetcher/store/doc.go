// Package store keeps blobs on disk, piece by piece, and says at any moment which of their bytes are there.
//
// # What it promises
//
//   - A byte is handed out only when it lies in a piece that was marked as held. Anything else is [ErrMissing]: never zeros, never
//     a short read.
//   - A piece that is held is not written to again. It stays as it is until [Blob.ClearPieces] forgets it.
//   - A blob is complete only after its whole content was checked against its digest.
//   - kill -9 loses no piece that [Blob.MarkPiece] returned for.
//   - A machine that went down loses at most what the kernel had not yet written: pieces marked before it are checked against their
//     CRC-32C before they count again. Blobs recorded as complete are trusted, their bytes were synced before the record.
//   - What is open or pinned is never evicted, by no process.
//
// It knows nothing of registries, peers or images. It does not know either whether a piece is right before the whole blob is: the
// caller does, by a piece table or by the final digest, and uses [Blob.Source] and [Blob.ClearPieces] when it was wrong.
//
// # A blob's life
//
// [Store.Blob] opens or creates a blob. While it is being filled its state is "filling": [Blob.WriteAt] puts bytes into pieces that
// are missing, MarkPiece declares a piece held. [Blob.Verify] (or [Blob.Finish], when the caller hashed the bytes as they came) moves
// it to "verified": from then on [Blob.Complete] is true and nothing can be cleared. The sync of the data and the record of
// completion follow in the background and end in "durable"; the last [Blob.Close] and [Store.Close] wait for them. A crash between
// the two costs one more Verify, no bytes.
//
// # On disk
//
//	lock                                 flock: pinning, evicting and removing exclude each other
//	blobs/<algorithm>/<hex>/data         the blob, sparse, its full size from the start
//	blobs/<algorithm>/<hex>/pieces       what of it is held, see pieces.go
//	blobs/<algorithm>/<hex>/used         its mtime is the time of last use; flock LOCK_SH: somebody has the blob open
//	blobs/<algorithm>/<hex>/writer       flock LOCK_EX: one process fills the blob; its pid as text
//	pins/<hash of owner>/<algorithm>-<hex>   a pin; the content is the owner's name
//	content/<algorithm>/<hex>            manifests and indexes
//	refs/<hash of name>.json             what a tag pointed to when it was last seen
//	trash/                               on its way out, or on its way in; emptied by Open
//
// Files have mode 0600, folders 0700. A blob leaves by one rename into trash/, so it is there or it is not.
//
// # Several processes
//
// Everybody who has a blob open holds LOCK_SH on "used", and eviction needs LOCK_EX there without waiting. Filling needs LOCK_EX on
// "writer": a second process waits for it, bounded by its context, and then finds what the first one got. These are two files and
// not one lock that is downgraded, because flock(2) does not downgrade atomically: an evicting process could slip in between. Inside
// one process all handles of a digest share one state, and readers of a complete blob share nothing that they could wait for.
//
// The store is for local file systems of Linux (sparse files, flock, sync_file_range).
package store
