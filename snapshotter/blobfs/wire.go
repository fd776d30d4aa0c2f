package blobfs

import (
	"encoding/binary"
	"errors"
	"syscall"
)

// The opcodes that are answered otherwise than with ENOSYS. Names and numbers are
// those of include/uapi/linux/fuse.h.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opStatfs      = 17
	opRelease     = 18
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42
	opReaddirplus = 44
)

// Messages to the kernel that answer no request: unique is 0 and error is one of these.
const (
	notifyInvalEntry = 3
	notifyResend     = 7
)

const (
	inHeaderSize  = 40
	outHeaderSize = 16
	attrSize      = 88
	entrySize     = 40 + attrSize
	attrOutSize   = 16 + attrSize
	openOutSize   = 16
	initOutSize   = 64
	statfsSize    = 80
	direntSize    = 24
	readInSize    = 24 // fh, offset, size: what we need of fuse_read_in

	rootNode = 1
	maxName  = 255 // NAME_MAX
)

const (
	fuseMajor = 7
	// fuseMinor is the version that brought HAS_RESEND (Linux 6.9).
	fuseMinor = 40

	flagAsyncRead      = 1 << 0
	flagDoReaddirplus  = 1 << 13
	flagReaddirAuto    = 1 << 14
	flagAsyncDIO       = 1 << 15
	flagParallelDirops = 1 << 18
	flagMaxPages       = 1 << 22
	flagInitExt        = 1 << 30
	flag2HasResend     = 1 << 7

	openKeepCache = 1 << 1
	// openNoFlush spares a FLUSH at each close, which a process that ends would wait for,
	// and be a zombie, while no daemon is there.
	openNoFlush = 1 << 5
)

const (
	page = 4096
	// maxRead is the most that one READ asks for. The kernel's readahead window has the
	// same size, so more would only cost memory.
	maxRead = 128 << 10
	// maxReadEver is the most that is answered: what a mount of another version of us
	// may have been made with.
	maxReadEver = 1 << 20
	// maxWrite is the least the kernel allows; nobody writes. A read of a request
	// needs a buffer larger than that (and than 8 KiB), in every version of us.
	maxWrite      = 4096
	requestBuffer = 64 << 10
	// maxBackground is how many asynchronous reads (readahead, direct I/O) the kernel
	// sends at once, for all files together: as many as it can say, because otherwise
	// one stalled file's would keep back the others' before they reach us.
	maxBackground = 65535
	// valid is how long the kernel need not ask again about names and attributes, in
	// seconds. They never change; Remove tells of the one exception.
	valid = 24 * 3600
)

var native = binary.NativeEndian

// errMalformed tells of bytes that are no request.
var errMalformed = errors.New("not a FUSE request")

// request is one request of the kernel. arg points into the buffer it was read into.
type request struct {
	op     uint32
	unique uint64
	node   uint64
	pid    uint32 // thread that waits, in the PID namespace of the mount; 0 when unknown
	arg    []byte
}

// parse decodes a request's header.
func parse(b []byte) (request, error) {
	if len(b) < inHeaderSize || uint64(native.Uint32(b)) != uint64(len(b)) {
		return request{}, errMalformed
	}
	return request{
		op:     native.Uint32(b[4:]),
		unique: native.Uint64(b[8:]),
		node:   native.Uint64(b[16:]),
		pid:    native.Uint32(b[32:]),
		arg:    b[inHeaderSize:],
	}, nil
}

// readRange decodes what READ and READDIR have in common.
func (r request) readRange() (off int64, size int, ok bool) {
	if len(r.arg) < readInSize {
		return 0, 0, false
	}
	o, n := native.Uint64(r.arg[8:]), native.Uint32(r.arg[16:])
	if o > 1<<63-1 || n > maxReadEver {
		return 0, 0, false
	}
	return int64(o), int(n), true
}

// name decodes the name that LOOKUP asks for.
func (r request) name() (string, bool) {
	n := len(r.arg) - 1
	if n < 1 || n > maxName || r.arg[n] != 0 {
		return "", false
	}
	return string(r.arg[:n]), true
}

// putHeader writes a reply's header for a body of n bytes.
func putHeader(b []byte, unique uint64, errno syscall.Errno, n int) {
	native.PutUint32(b, uint32(outHeaderSize+n))
	native.PutUint32(b[4:], uint32(-int32(errno)))
	native.PutUint64(b[8:], unique)
}

// putAttr writes a struct fuse_attr. Only root reads the files: a layer may be private.
func putAttr(b []byte, ino uint64, size int64) {
	mode, links := uint32(syscall.S_IFREG|0o400), uint32(1)
	if ino == rootNode {
		mode, links = syscall.S_IFDIR|0o500, 2
	}
	native.PutUint64(b, ino)
	native.PutUint64(b[8:], uint64(size))
	native.PutUint64(b[16:], uint64(size)/512+min(1, uint64(size)%512))
	native.PutUint32(b[60:], mode)
	native.PutUint32(b[64:], links)
	native.PutUint32(b[80:], page)
}

// putEntry writes a struct fuse_entry_out.
func putEntry(b []byte, ino uint64, size int64) {
	native.PutUint64(b, ino)
	native.PutUint64(b[16:], valid)
	native.PutUint64(b[24:], valid)
	putAttr(b[40:], ino, size)
}

// appendDirent appends a struct fuse_dirent, after a struct fuse_entry_out when plus is
// set, or tells that it does not fit into the capacity of b.
func appendDirent(b []byte, plus bool, ino, next uint64, size int64, name string) ([]byte, bool) {
	n := direntSize + (len(name)+7)&^7
	head := 0
	if plus {
		head = entrySize
	}
	at := len(b)
	if at+head+n > cap(b) {
		return b, false
	}
	b = b[:at+head+n]
	clear(b[at:])
	if plus && name != "." && name != ".." { // a node 0 is no lookup, as those two must be
		putEntry(b[at:], ino, size)
	}
	d := b[at+head:]
	kind := uint32(syscall.DT_REG)
	if ino == rootNode {
		kind = syscall.DT_DIR
	}
	native.PutUint64(d, ino)
	native.PutUint64(d[8:], next)
	native.PutUint32(d[16:], uint32(len(name)))
	native.PutUint32(d[20:], kind)
	copy(d[direntSize:], name)
	return b, true
}
