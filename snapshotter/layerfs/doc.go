// Package layerfs mounts layers of images with the kernel's own file system, EROFS,
// whether their bytes are on the node or still on their way.
//
// It is the three-method file system (Mount, Check, Unmount) that stargz-snapshotter's
// snapshot package asks for, as package lazy is, and joins what the packages beside it do:
//
//	index       what is in a layer and where
//	layerstore  the layer on disk: metadata image, data file, which chunks are present
//	blobfs      data files that are not complete, as files that a kernel can read
//	keeper      has /dev/fuse open too, so that mounts outlive the daemon
//	erofs       the mount
//
// # How a layer comes
//
// Bring gets a layer into the store, in one of these ways, the first that works:
//
//  1. it is there already, for another image or from a former run;
//  2. it brings a table of contents along (eStargz, zstd:chunked);
//  3. another node that has it says what is in it, or an index of it is published beside its image;
//  4. all of it is fetched and unpacked, side by side with the image's other layers.
//
// Those of 3 are asked at once. After 1 to 3 the layer's bytes may be missing: they come when they are read, and in the
// background once nobody has waited for any for a while; what the index says is read first comes at once, before the
// layer is mounted. When a layer is complete that its containers read here, the index for others is made: with what
// they read first. A layer that cannot be had in these ways
// (ErrNotIndexable: something in it that an index cannot say) is an error, and containerd unpacks
// it in its own way.
//
// # How it is mounted
//
// A complete layer is mounted from its files; the daemon has no part in what happens then. Any
// other has a file in the directory of blobfs for its data. When it has become complete, its
// mounts are replaced, one at a time and unseen: containers that run keep the former one, those
// that start get the latter. What is mounted how is noted in a file for each mount, because the
// kernel does not tell.
//
// # The daemon's end
//
// Close unmounts nothing, and kill -9 neither. Reads of what is missing wait until there is a
// daemon again: New takes over the connection from the keeper, Restore gives it its
// files back. If the keeper was lost as well, such reads fail, all layers are mounted anew, and
// containers that run on an incomplete layer have to be started again. The keeper ends with the
// daemon when no mount needs it, and by Abandon.
//
// This process never waits for a mount of its own: a child mounts and unmounts (RunMounter).
// See package blobfs for why.
//
// # When a layer goes
//
// With its last mount it leaves the store, its fetch is cancelled and its space comes free; at
// once, or when the last container that has the mount open has ended. Layers that were brought
// and never mounted go after some minutes.
package layerfs
