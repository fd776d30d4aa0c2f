// Package snapshotter is the node daemon, containerd-quay-grpc, without its main:
// the configuration file, containerd's snapshots API on a unix socket, and the start and end of
// everything that runs on a node.
//
//	Config        what /etc/quay/config.toml says
//	OpenSnapshots the snapshotter: overlayfs, with layers mounted by package layerfs (EROFS) or,
//	              on kernels that cannot, by package lazy (FUSE trees)
//	Server        the snapshots API over it, on a socket
//	Node          fetcher, mirror and node API (node.go)
//	Run           all of them together, until a signal
//
// The snapshotter keeps its state in <root>/snapshotter: metadata.db, one folder for each
// snapshot, and a lock that a second daemon on the same folder stumbles over.
//
// It promises that a start never fails over a single snapshot: mounts of the
// former daemon are taken over or made again side by side while the API is already
// served, and one that cannot be made is tried again each time containerd asks for it.
package snapshotter
