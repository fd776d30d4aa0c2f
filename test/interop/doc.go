// Package interop holds the tests with other BitTorrent programs: aria2, transmission and qbittorrent as people run them, and
// opentracker.
//
// A published layer is downloaded by each of them from our seeder, and given back by it to a node of ours that has nothing, through
// our tracker and through opentracker; and downloaded from the registry alone, as a web seed. What they wrote must have the
// layer's digest.
//
// The test program runs itself again inside a network namespace of its own, where loopback has a few more addresses: clients
// refuse peers on 127.0.0.0/8, and not one packet of theirs can get out, whatever they mean to announce. That needs root; without,
// and without the programs, the tests are skipped.
package interop
