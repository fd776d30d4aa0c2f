// Package open is this node's part in open BitTorrent swarms: those of published layers, which any BitTorrent client may join.
//
// A published layer has ordinary metainfo (package published): real SHA-1 piece hashes, trackers, an infohash that anybody may
// know. Nothing of the trust domain is behind the port of this package, and no node identity is shown on it: it speaks plain
// BitTorrent (BEP 3) and serves the layers that were added, to whoever asks. The closed swarm of a cluster is package swarm.
//
// # What it promises
//
//   - No byte of a stranger reaches the storage before the metainfo piece around it matched its SHA-1. Until then it is in memory,
//     within Options.Buffer.
//   - No byte is served that does not match the metainfo's SHA-1, also of a layer that came another way: each piece is checked when it
//     is first asked for, a few at random when the layer is added. If one does not match, the metainfo is of something else:
//     the torrent ends with ErrMismatch.
//   - A private torrent (BEP 27), and every torrent when Options.Public is false, has peers from its trackers, from AddPeers, and those
//     that call: no DHT, no peer exchange, no local service discovery.
//   - Every list, queue and number of connections has a bound.
//
// SHA-1 protects against accidents and lazy liars, not against somebody who made two layers with one hash. Whether the layer is the
// right one is decided by its digest, and that is for the caller to check. When it is wrong, no peer is to blame but the metainfo:
// so what MarkPiece is told of the supplier is the torrent, see Torrent.Supplier.
//
// # Two kinds of pieces
//
// The caller counts pieces of the store (store.PieceSize), the wire those of the metainfo, which may be longer, shorter or not
// aligned. A wish for a store piece is a wish for all metainfo pieces that it lies in; it is marked when they have all been
// checked. What came with them of other store pieces is not written, only kept in memory for as long as there is room, so that
// a wish for those is then met at once: whoever fetches a torrent of long pieces should wish for neighbours one after the other.
//
// # Web seeds
//
// The library's web-seed client is off: it ignores Retry-After, drops a file for good at one 404 and runs to a 64 MiB boundary. The
// registry is asked by package origin, and what it gave is announced here with Torrent.Have.
//
// # Trackers
//
// Announcing is done here and not by the library, whose HTTPS client takes any certificate: a token in a tracker's URL would be
// anybody's. Ours checks certificates, never follows a redirect to plain HTTP, and no URL of a tracker appears in a log or an error
// beyond its scheme and host. UDP trackers (BEP 15) have no such protection, and none to lose: a token in the URL of one is sent in
// the clear (BEP 41).
//
// # Locks
//
// As in package swarm: no method of Storage is called with a lock held; Have, Lost, Want and Unwant never block; Drop and Close wait for
// Storage methods in progress and are never called from one.
package open
