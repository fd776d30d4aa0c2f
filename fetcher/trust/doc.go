// Package trust says which machines are one cluster, and proves it on every connection.
//
// A cluster is whoever holds its secret: one small file, made once with `docker quay node secret` and copied to
// every node. Nothing else is configured. From the secret each node derives the same certificate authority, signs
// itself a leaf with a key that never leaves the process, and from then on both ends of every connection check that the
// other's leaf was signed by that authority (TLS 1.3, mutual). There is nothing to renew, to distribute or to revoke
// one by one: to shut a node out, give the others a new secret.
//
// # What is promised
//
//   - No byte of application data passes before both ends proved that they hold the secret.
//   - The node ID of a peer (see [PeerID]) comes from the key that it proved to hold, not from what it says.
//   - Clocks do not matter: certificates are judged at a fixed moment, so a machine that believes in 1970 still joins.
//   - One port number serves everything: ALPN chooses the protocol of a connection (see [Listener]), and the UDP port of
//     the same number carries membership packets.
//
// # What is not
//
// Every holder of the secret is trusted alike: a member can pretend to be a new node, and a member that is broken into
// gives the cluster away. The names and addresses of nodes are not checked, only membership.
//
// The package knows nothing of blobs, torrents or HTTP.
package trust
