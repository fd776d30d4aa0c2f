// Package candidate is what the benchmarks of images compare: ways for containerd to get the files of an image, each on a machine
// that has nothing yet, over the same link.
//
//	overlayfs  containerd alone: every layer is fetched and unpacked before the image counts as pulled
//	stargz     the snapshotter of the stargz project, as its library makes it, with that project's defaults, on eStargz layers
//	quay       docker quay's node daemon
//
// A [World] is a registry and the links to it. A [Machine] is one node of it with a containerd and, beside it, what the candidate
// needs; it begins empty and leaves nothing behind:
//
//	m, err := w.Start(ctx, candidate.Stargz(), 1)
//	err = m.Pull(ctx, ref)                    // what `ctr image pull` or a kubelet's containerd does
//	c, err := m.Run(ctx, ref, "web", first)   // returns at the first useful output
//	… m.Received() bytes later …
//	err = errors.Join(c.Close(), m.Close())
//
// All candidates are asked through the same containerd, by its transfer service. What one does by itself in the background goes on
// until its machine is closed.
//
// Programs that use the package call [Init] first.
package candidate
