// Package cluster knows the other nodes of the trust domain: which of them
// answer, who of them takes part in the fetch of a blob, and which of them
// asks the registry for which part of it.
//
// # Membership
//
// A node is told a few addresses (--peer). It says hello to each, over mutual
// TLS with the cluster's identity, and the answer names the other members that
// node knows, so that one address is enough to find all. A member that has not
// answered for MemberTTL is no longer a member. Nothing is elected and nothing
// is written down: a node that restarts says hello again.
//
// # Swarms
//
// A node that starts to fetch a blob announces that to every live member and
// gets back what each of them knows of its own part in that blob: nothing, a
// share of it, or all. The order is fixed: a node is ready to answer for a blob
// before it announces it, so that of two nodes that start at the same instant
// at least one learns of the other before either asks the registry.
//
// # Shares
//
// A blob is cut into segments of SegmentSize bytes. Rendezvous hashing over the
// nodes that take part names an owner for each segment; every node computes the
// same owners from the same members, and a member that leaves changes only the
// owners of its own segments. What a node already fetches or holds (its claims)
// outranks the hash, so that a node that joins late moves no work.
//
// The package moves no blob data except for ranged reads of pieces that a node
// already holds, and it knows nothing of registries, disks or BitTorrent.
package cluster
