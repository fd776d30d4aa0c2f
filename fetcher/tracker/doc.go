// Package tracker is a BitTorrent tracker over HTTP: BEP 3, compact answers (BEP 23), IPv6 (BEP 7), scrape (BEP 48).
//
// A [Tracker] is an http.Handler that tells clients of one torrent about each other. It keeps everything in memory and forgets a
// client that has not announced itself for two intervals; after a restart clients are back within one.
//
// # What is promised
//
// A client is listed under the address that its connection comes from and the port that it names, never under another address: nobody
// can point a swarm at a third party. The one exception is a proxy on the same machine, when the user says that there is one.
// Addresses of loopback are told to clients on loopback only: to others they are wrong.
//
// All is bounded: clients in all (the one that has been silent longest goes first), clients and announces of one address, the
// addresses that are remembered, connections, and the time that each may take.
//
// With a token only who knows it is answered: it is a part of the URL, as clients have no other place for it. It is compared in
// constant time and appears in no log. The connection is not encrypted: in front of networks that are not trusted goes a proxy with TLS.
//
// It knows nothing of layers, images or registries; a list of allowed infohashes is all that it can be told of them.
package tracker
