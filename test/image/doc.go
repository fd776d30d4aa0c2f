// Package image makes the images of the tests, the demo and the benchmarks, from real files: a small one around a static
// busybox, one of Debian with Python out of Debian's own packages, several more of programs whose start can be watched ([Apps]),
// one of random bytes, one of files to read and one of all that is hard to get right in a layer ([Nasty]). Layers come as plain gzip,
// zstd or tar, eStargz or zstd:chunked.
//
// The same input gives the same digests every time, those of Apps excepted: entries are sorted, times are clamped, nothing depends
// on the clock or the machine. What is made is kept as OCI layouts below a cache folder (build/images), named after everything that goes
// into it, so that the second run finds it. [Image.Push] brings one into a registry.
//
// The package knows the distribution API and the formats of layers; it knows nothing of the rig or of docker quay.
package image
