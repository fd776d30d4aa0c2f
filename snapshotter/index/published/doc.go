// Package published puts the indexes of an image's layers beside the image in its registry, and
// finds them there, so that the very first node to run an unmodified image need not read its
// layers to the end before the first container starts.
//
// # What lies in the registry
//
// One OCI manifest whose subject is the image's manifest for one platform, with an empty config
// and one blob a layer: the encoded index, annotated with the digest of the layer that it is
// of. The image and its digest stay as they are. [Store] publishes once: the same indexes again
// change nothing, others become one more manifest. [Finder.Find] takes the first that is usable;
// that each says the same of its layer makes the order unimportant.
//
// # What is checked, and what is trusted
//
// A referrer can say anything, and so can an index. What is found is bounded in number, size,
// memory and time; it must name the image as its subject, and the index must decode, keep all rules of
// [index.Index.Validate], and say that it is of the layer asked for, with its digest and size.
// That a reader gets no other bytes than the index promises is the work of [index.Index.Fill].
//
// But what the index promises is its publisher's word: names, owners, modes, and the sums
// of the chunks. Somebody who may push to the repository can promise another tree than
// the layer has, and other contents: decoding may begin where he says, in the middle of a gzip
// stream, with the window that he gives. So a published index is trusted as much as the repository
// it lies in, which is less than a digest is trusted. Whoever uses one therefore calls
// [Verify] when all of the layer is there: it reads the blob once more, makes the index that
// belongs to it, and compares.
//
// # What it knows of
//
// It is a leaf: it has no daemon, store or peers in it, and imports package index and nothing else
// of this program, so that the command line may use it as well as the daemon. Registries
// are two small interfaces that origin.Repository has; the blob of an index comes from wherever
// [Query.Open] gets it, so that the nodes of a cluster share it as they do layers.
package published
