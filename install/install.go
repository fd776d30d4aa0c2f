// Package install holds the files that a node needs: the daemon's systemd unit, its
// commented configuration, and what makes containerd use it. They are embedded, so that
// a single binary can put them in place.
//
// The files are also there to be read and copied by hand.
package install

import _ "embed"

var (
	// Config is /etc/quay/config.toml: every key with its meaning and its default.
	//
	//go:embed config.toml
	Config string

	// Unit is /etc/systemd/system/containerd-quay-grpc.service.
	//
	//go:embed systemd/containerd-quay-grpc.service
	Unit string

	// Containerd2 goes into the config.toml of containerd 2.x (version 3): the
	// quay snapshotter, for pulls by the transfer service and by CRI.
	//
	//go:embed containerd/containerd-2.toml
	Containerd2 string

	// Containerd17 goes into the config.toml of containerd 1.6 and 1.7 (version 2).
	//
	//go:embed containerd/containerd-1.7.toml
	Containerd17 string

	// Hosts is /etc/containerd/certs.d/_default/hosts.toml: containerd then asks the
	// daemon's mirror first, for every registry, and the registry itself when it does not answer.
	//
	//go:embed containerd/hosts.toml
	Hosts string
)
