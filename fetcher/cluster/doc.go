// Package cluster knows who of the trust domain holds or fetches a blob, decides
// which node asks the registry for which part of it, and carries the calls
// between members.
//
// # Keepers
//
// Who is a member is another package's knowledge ([Membership], package gossip).
// For each digest [Keepers] ranks the members by rendezvous hashing; every node
// computes the same from the same members. The first is the blob's keeper: nodes
// that fetch or hold the blob tell it ([Cluster.Announce]), and are told of
// others. The second hears of complete blobs as well. When a keeper does not
// answer, the next in rank is asked; what the old one knew is told again by the
// nodes themselves, so nothing is written down and nothing is elected. A keeper
// that knows a better one says so once.
//
// # Leases
//
// A blob is cut into segments of SegmentSize bytes. A node that could take one
// asks its keeper, which lends each segment to one node, lowest first ([Book]).
// Leases end when the node holds the segment, gives it up, falls silent or
// stalls; one that takes much longer than usual is lent to a second node. A fast
// node so takes more of the work and a slow one less. While somebody holds all of
// the blob nothing is lent, unless what peers hold does not come.
//
// The order at the start is fixed: a node answers for a blob before it tells the
// keeper of it, since from then on others may come.
//
// # Piece tables
//
// A [Statement] is what one node signed of the content of some pieces. It can be
// passed on by anybody and changed by nobody, and proves who lied when the
// blob's digest shows that it was false.
//
// # What it does not do
//
// The package moves no blob data except for ranged reads of pieces that a node
// holds or reads through, and it knows nothing of disks or BitTorrent. What is
// done for members without a way to a registry is behind [Errands].
//
// Book, Keepers, Pace, StandIn and InTurn do no input and output and have no
// clock of their own; a simulation runs them with ten thousand nodes.
package cluster
