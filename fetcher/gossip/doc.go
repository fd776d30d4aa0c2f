// Package gossip keeps the list of the live members of a trust domain.
//
// A node is told one or a few addresses, or a DNS name, or to look about on its network; one member that answers is enough
// to find all. There is no leader, no server and nothing on disk. The protocol is SWIM, by hashicorp/memberlist: each node
// asks one other in turn whether it is alive, and what is new travels on the back of these packets. Cost per node does not
// depend on the number of members.
//
// # One port number
//
// Packets go over UDP, sealed with a key of the cluster's secret: per sender, bound to one receiver, and refused when they
// come twice. Streams, for whole lists and where UDP does not pass, go over the node's TLS port by a protocol name of their
// own. A stranger's packets and connections change nothing and learn nothing.
//
// # Names and addresses
//
// A member's name is its node ID. What a member says of itself (address, zone, roles) carries a number that rises and a
// signature by the key behind that ID, so it can be passed on by anybody and changed by nobody. memberlist itself is given an
// address made from the ID, which never changes; packets and streams are sent to the address that was signed last. A node
// whose address changes is therefore found again as soon as it said so, and does not have to be taken for dead first.
//
// A node that is not told its address takes the local end of its first stream with a peer, which is an address that peers
// can use, and a new one when that is no longer an address of the machine.
//
// # What is promised
//
//   - Every node finds every other when each of them can reach one of the others, also after the network was cut in two:
//     configured peers and members that were lost are dialled again for a day.
//   - A member that dies is gone within about five seconds in a small cluster (a hundred members: ten), one that leaves
//     at once.
//   - Clocks do not matter: only durations are measured, and only by the monotonic clock.
//   - Everything kept or queued has a bound, whoever sends.
//
// # What is not
//
// Members trust each other. A node that holds the secret and lies can
//
//   - call others dead: they object, and flap while the lies go on; with the highest incarnation number they cannot
//     object and stay off the list until they are started again;
//   - invent members, up to the bound of the list, and so crowd others out; nobody reaches an invented one, so that it is
//     dropped after a few seconds;
//   - point its own entry at a foreign address, which then gets a sealed packet from some members every now and then.
//
// It cannot give another member a false address, zone or role, speak in another's name in a broadcast, answer for another on
// a stream (the certificate is checked against the name), or make a node hold more than 64 MB for the few seconds that a
// stream may last.
//
// The package knows nothing of blobs and registries.
package gossip
