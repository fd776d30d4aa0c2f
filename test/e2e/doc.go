// Package e2e holds the acceptance tests of docker quay: the binaries as they are
// shipped, on real registries, containerd and Docker Engines, each node in a network
// namespace of its own.
//
// Read as the specification, from the promise to the exception:
//
//   - round_test.go: what every runtime must be able to do with an image: refuse it
//     without credentials, pull and run it, pull it again with the registry away, give
//     it to a node that cannot reach the registry's blobs;
//   - lazy_test.go: containers that start before their image is there, and the mirror; members_test.go: the same with
//     nothing but another node's word of what is in the layers;
//   - layers_test.go: images that the daemon unpacks; trees_test.go: that what is mounted is what containerd
//     would unpack; storm_test.go: containers that read while the daemon is killed;
//     upgrade_test.go: the same while it is replaced by another version, and when the keeper is killed;
//   - disk_test.go: what a node's folders may lie on, full disks and full quotas; outage_test.go: a registry
//     and other nodes that go away under running containers;
//   - crash_test.go: kill -9 and Ctrl-C, and what the next pull then fetches;
//   - hostile_test.go: registries and peers that misbehave, and strangers;
//   - cli_test.go: what a person or a program sees of docker quay;
//   - share_test.go: several pulls on one store.
//
// The rest is the world these tests live in: world_test.go (network, registry,
// secret), user_test.go (somebody who runs docker-quay), node_test.go (the node daemon
// with its containerd), tenant_test.go (a container whose files are read). Everything is started through a rig, which takes it down.
package e2e
