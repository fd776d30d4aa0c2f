// Package swarm moves blobs between the nodes of a cluster in bulk, over BitTorrent inside mutual TLS.
//
// # A swarm without a torrent file
//
// The info dictionary of a blob is made from its descriptor alone: digest, size and piece size (see [Infohash]). Every
// node knows the infohash the moment it knows what it wants, so cold nodes are one swarm at once, with no tracker, no
// publisher and no first downloader. The piece hashes in the dictionary are placeholders: they say nothing of the
// content. Whether a piece is good is for its [Storage] to say, and whether the blob is, for its digest. That is safe
// only among members, hence the TLS: see package trust.
//
// # The life of a piece
//
// The caller names the pieces that it wants from peers ([Torrent.Want]); nothing else is asked for (but see below). Chunks
// arrive from one or more peers and go to Storage.WriteAt, concurrently. When all are written, Storage.MarkPiece is
// called once with the piece's suppliers. If it returns nil the piece is held: peers are told (HAVE) and may ask for it.
// If it returns an error wrapping [ErrBadPiece], the piece is fetched again, and a sole supplier is banned. Any other
// error, and any of WriteAt, is taken for trouble with the disk: the torrent stops downloading for a few seconds and
// shows the error in its [Stats].
//
// Pieces that came another way are announced with [Torrent.Have]. A piece that is already held is never written.
//
// While a torrent has no piece and no wish, the library would not connect to anyone, and a caller that waits for
// [Torrent.Availability] before it wishes would wait for ever. In that state the swarm itself wishes for one missing
// piece, and takes the wish back when all peers are connected; that piece may arrive unasked.
//
// # Peers
//
// Peers are addresses ([Torrent.AddPeers]) until they are connected, and node IDs (trust.PeerID) from then on. The
// peer ID of the BitTorrent handshake carries the node ID, and a connection on which it differs from the TLS identity
// is cut, so a node ID in [Stats], MarkPiece or [Torrent.Ban] is proven. An incomplete torrent tries those of its peers that are
// not connected about once a second, since a peer refuses connections for a torrent that it has not been given yet; an
// address at which no peer is found is tried more and more rarely, down to twice a minute.
//
// # Locks
//
// No method of Storage is called with a lock of the swarm or of the library held. Have, Lost, Want and Unwant only note
// what is to be done (one goroutine per torrent does it), never block, and may be called from within Storage methods
// and with the caller's locks held. The other methods of Torrent may wait for the library and should be called with no
// lock held that a Storage method takes. Drop and Close wait for Storage methods in progress: never call them from one.
// After Drop has returned, no method of the torrent's Storage is called any more.
//
// The package knows nothing of registries, of who owns which piece, or of when a peer is worth waiting for.
package swarm
