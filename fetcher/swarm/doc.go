// Package swarm tells which node of a cluster holds which piece of which blob.
//
// It speaks the part of BitTorrent that is made for that (BEP 3), inside mutual TLS: the handshake, which names the blob, the bitfield, in
// which a peer lists its pieces, and HAVE, by which it tells of one more at once. No piece of a blob is ever asked for, given or taken
// this way: a node requests nothing and unchokes nobody. Who wants a piece reads it from one of those that hold it, by other means.
//
// # A swarm without a torrent file
//
// The info dictionary of a blob is made from its descriptor alone: digest, size and piece size (see [Infohash]). Every node knows the
// infohash the moment it knows what it wants, so cold nodes are one swarm at once, with no tracker, no publisher and no first downloader.
// The piece hashes in the dictionary are placeholders: they say nothing of the content. That a peer says it holds a piece does not mean
// that it does, nor that the piece is right.
//
// # What a node tells
//
// What is held when the blob is added ([Swarm.Add]), and from then on what [Torrent.Have] and [Torrent.Lost] say. Who connects gets it all,
// who is connected hears of each piece that is new. For a piece that is gone BitTorrent has no word: the torrent's connections are closed
// instead, and the next bitfield is right. That takes a second or so, and does not happen when the piece is there again by then.
//
// # Peers
//
// Peers are addresses ([Torrent.AddPeers]) until they are connected, and node IDs (trust.PeerID) from then on. The peer ID of the
// BitTorrent handshake carries the node ID, and a connection on which it differs from the TLS identity is cut, so a node ID in
// [Torrent.Peers] or [Torrent.Ban] is proven. An incomplete torrent tries those of its peers that are not connected about once a second,
// since a peer refuses connections for a torrent that it has not been given yet; an address at which no peer is found is tried more and
// more rarely, down to twice a minute. A torrent that has all pieces dials nobody, and two that have all do not stay connected.
//
// The library dials only for a torrent that wants data which it may download. Here every torrent wants all pieces that it lacks, and then
// downloading is forbidden to it: it keeps looking for peers that have them, and never asks.
//
// # Locks
//
// Have and Lost only note what is to be done (one goroutine per torrent does it), never block, and may be called with the caller's locks
// held, as may AddPeers. The other methods of Torrent may wait for the library.
//
// The package knows nothing of registries, of bytes, or of who is worth asking.
package swarm
