// Package blobfs serves one flat directory of read-only files over FUSE: the data files
// of the layers that are not complete on this node. The kernel's EROFS opens them as
// devices of its mounts (device=MOUNTPOINT/NAME) and reads them when a container reads.
//
//	Connect  gets the node's FUSE connection, from the keeper or by a new mount
//	Server   answers its requests
//	File     is what a caller adds: something with a size that can be read
//
// # Promises
//
// A read is answered with all of its bytes or with an error, never with fewer: EROFS
// takes a short read for zeros. What fails, fails with EIO.
//
// One file cannot hold up another. Requests are read by a few workers, which answer at
// once what a File has at hand (Prompt); other reads go to a bounded set of goroutines,
// of which one file gets its share only, in the order of arrival and in turn with other
// files. A read that lasts too long, whose file is removed, or whose reader was killed
// is answered although the File does not return; its goroutine stays taken until it does.
//
// Memory is bounded: one buffer for each worker and each read under way, and a small
// record for each read that waits.
//
// # Life of the connection
//
// The mount, the connection and the kernel's inodes live longer than the Server: a
// keeper has the connection open too. A Server that ends leaves unanswered what it has
// not finished, on purpose, and the next one has the kernel send it again (Resend); to
// the reader that was one slow read. Therefore:
//
//   - an id names the same bytes as long as the mount lives, also after Remove, because
//     the kernel may hold pages and inodes of it;
//   - there is no INIT after a takeover, and nothing here depends on what one said but
//     maxWrite, which never grows beyond the read buffer of any version;
//   - two Servers must not read from one connection at a time: what the former had read
//     when the latter called Resend is lost. The caller has a lock for that;
//   - a request for an id that nobody has added yet waits while the former daemon's
//     files are being added again (Options.Restore, Server.Restored), then fails.
//
// # The process of a Server
//
// It should not use its own mount, not even to mount EROFS over it: that is a child
// process's work. A thread that waits for an answer of its own process when that is
// killed cannot end before the next daemon answers, and until then the dead process
// keeps its locks and sockets, for which the next daemon may be waiting. And to open a
// file with package os there stalls at once: that asks the kernel to poll the
// file, under a lock that the Server's workers need to answer. Other processes may do
// as they like.
//
// To unmount an EROFS waits for the reads that are under way, and cannot be killed: do
// it while a Server runs, or abort the connection before (umount2 of the FUSE mount with
// MNT_FORCE).
//
// # Signals
//
// The kernel tells when a signal reaches a waiting reader (INTERRUPT), any signal. To
// fail the read then would be wrong: a page that cannot be filled is EIO to the reader,
// and a Go program gets signals for its scheduler all the time. So a read ends with
// EINTR only when its reader is about to die of the signal, which /proc tells.
package blobfs
