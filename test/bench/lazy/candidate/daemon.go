package candidate

import "github.com/docker-quay/docker-quay/test/daemon"

// Daemon is the machine's node daemon; nil unless the candidate is Quay.
func (m *Machine) Daemon() *daemon.Daemon { return m.quay }
