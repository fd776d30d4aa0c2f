// Package fetcher gets blobs of container images onto this node from the
// nearest place that has them, and is the only way by which any part of this
// program gets one.
//
// # The life of a blob
//
// [Fetcher.Blob] returns a handle at once, whatever is on disk. What the store
// holds can be read at once. Anything else is fetched piece by piece (64 KiB
// to 1 MiB, see store.PieceSize) from three sources that run side by side:
//
//   - the registry, asked in ranges. When other nodes fetch the same blob, each
//     asks only for the segments it was lent (package cluster), so that the cluster
//     as a whole takes one copy;
//   - the nodes of the trust domain, by ranged reads, each of pieces that the swarm
//     (package swarm) says that node has;
//   - open swarms, ordinary BitTorrent with anybody (package open), where an image's
//     publisher made torrents of it.
//
// Reads have a [Priority]. A Demand read (a container is waiting) asks the
// nearest holder for just these bytes and, when that one is slow, the registry
// as well. While one is under way the bulk transfers of this process hold back.
// Prefetch is the same without the hurry. Background fetches everything.
//
// # What is promised
//
// A blob is complete when the digest of all its bytes was checked, never before.
// [Blob.Wait] and the end of [Blob.Reader] mean that. [Blob.ReadAt] may return
// bytes of a piece that came from the registry or from a member of the trust
// domain while the whole is not there yet: its callers check what they read
// against a digest of their own (the chunk digests of a lazy layer). When the
// whole turns out wrong, the pieces that peers supplied are fetched again from
// the registry and compared, whoever sent a wrong one is not asked again, and
// the blob completes or fails with [ErrMismatch].
//
// What was fetched stays: a killed process loses no piece that was marked, and
// the next pull goes on from there.
//
// # Errors
//
// A registry that refuses (no such image, no access, TLS) ends a fetch unless
// peers can still supply what is missing. A registry that is away is waited for
// as long as peers make progress, else the fetch fails with its error. Every
// wait is bounded by the caller's context and by the deadlines in package
// cluster and origin.
package fetcher
