// Package published is metainfo of layers for any BitTorrent client: BEP 3, 12, 19 and 27.
//
// Nodes of one cluster need none of it: they make their infohashes from the digest alone (package swarm). Published metainfo is for
// everybody else. [Make] reads a layer once and hashes its pieces; [Torrent.Encode] and [Torrent.Magnet] are what other clients take;
// [Store] puts it beside the image in its registry, as an OCI referrer, and [Find] gets it from there. [FromQuay] asks a Quay that
// still makes torrents itself (up to 3.3).
//
// # What is promised
//
// Made metainfo is of the right bytes: a layer with another digest gives none. It depends on nothing but the layer and the options:
// no clock, no host, so that two publishers make the same file and meet in the same swarm.
//
// Parsed metainfo is hostile until its layer's digest was checked, which is not done here. What [Parse] returns is bounded in size,
// is of exactly one file, has as many piece hashes as its length needs, and names only URLs that a client can speak, and the library
// that downloads it reads it without trouble. Its name is never a path. A publisher who lies about the layer costs bytes, never a
// wrong layer: whoever downloads checks the digest in the end.
//
// # What stays private
//
// [Torrent.Private] keeps clients from DHT, peer exchange and local discovery. No tracker is ever added by this package. Metainfo
// itself tells the digest, the size and the piece hashes of a layer to who can read it: in the registry that is who can read the
// image.
//
// The package knows nothing of swarms, stores or peers.
package published
