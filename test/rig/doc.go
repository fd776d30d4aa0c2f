// Package rig builds a small world of real parts for end-to-end tests, benchmarks and the demo: network namespaces with
// shaped links, a distribution registry that counts what it serves and can be told to misbehave, containerd, dockerd and
// the classic Docker Engine.
//
// A [Rig] owns everything that was made through it and takes it down again, newest first: on Close, at the end of the test,
// on SIGINT and SIGTERM. What a killed run leaves behind (kill -9, the test binary's timeout) is removed by the next run
// that starts a rig. Two rigs never collide: every name and folder carries the rig's ID.
//
// Life of a test:
//
//	r := rig.ForTest(t)
//	network, err := r.NewNetwork(rig.NetworkOptions{Nodes: 2, Rate: 200 * rig.Mbit})
//	registry, err := r.StartRegistry(ctx, rig.RegistryOptions{Node: network.Registry()})
//	containerd, err := r.StartContainerd(ctx, rig.ContainerdOptions{Node: network.Node(1)})
//	… registry.Stats().Blobs bytes later …
//
// Everything listens on loopback or inside a namespace of the rig. Methods are safe for concurrent use unless they say
// otherwise. The package knows nothing of docker quay itself: its daemon and plugin are started like any other process, by
// [Rig.Start].
package rig
