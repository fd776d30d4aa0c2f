package blobfs

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrGone tells that the connection ended: unmounted, or aborted by the administrator.
var ErrGone = errors.New("the FUSE connection is gone")

// device is our descriptor of the connection. It does not block: the runtime's poller
// waits for requests, and nothing is left in a system call when the Server stops.
type device struct {
	f      *os.File
	raw    syscall.RawConn
	closed atomic.Bool
}

// openDevice makes a descriptor of its own of dev.
func openDevice(dev *os.File) (*device, error) {
	raw, err := dev.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	cerr := raw.Control(func(old uintptr) {
		if fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3); err == nil {
			err = unix.SetNonblock(fd, true)
		}
	})
	if err := errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("the FUSE connection cannot be duplicated: %w", err)
	}
	d := &device{f: os.NewFile(uintptr(fd), "/dev/fuse")}
	d.raw, err = d.f.SyscallConn()
	return d, err
}

// wake has all that wait for requests return, now and from now on.
func (d *device) wake() { d.f.SetReadDeadline(time.Unix(1, 0)) }

// close ends the use of the descriptor, by others too.
func (d *device) close() error {
	d.closed.Store(true)
	d.wake()
	return d.f.Close()
}

// state makes os.ErrClosed of what a RawConn says then, which has no name.
func (d *device) state(err error) error {
	if err != nil && d.closed.Load() {
		return os.ErrClosed
	}
	return err
}

// send writes one message that is not worth a buffer of its own.
func (d *device) send(msg []byte) error {
	var err error
	cerr := d.raw.Control(func(fd uintptr) { err = write(fd, msg) })
	return errors.Join(d.state(cerr), err)
}

func write(fd uintptr, msg []byte) error {
	for {
		_, err := unix.Write(int(fd), msg)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOENT):
			// The kernel gave up this request, or sent it again in between.
			return nil
		}
		return err
	}
}

// reader reads requests, one at a time. Its function is made once, not for each read.
type reader struct {
	dev *device
	buf []byte
	n   int
	err error
	fn  func(fd uintptr) bool
}

func newReader(d *device) *reader {
	r := &reader{dev: d, buf: make([]byte, requestBuffer)}
	touch(r.buf)
	r.fn = func(fd uintptr) bool {
		r.n, r.err = unix.Read(int(fd), r.buf)
		return r.err != unix.EAGAIN
	}
	return r
}

// next gives the bytes of a request, which the following call overwrites.
func (r *reader) next() ([]byte, error) {
	for {
		if err := r.dev.raw.Read(r.fn); err != nil {
			if err = r.dev.state(err); !errors.Is(err, os.ErrClosed) && !alive(r.dev.f) {
				err = ErrGone // the poller saw it first, and calls it "not pollable"
			}
			return nil, err
		}
		switch r.err {
		case nil:
			return r.buf[:r.n], nil
		case unix.EINTR, unix.ENOENT: // ENOENT: the reader went away while it was handed over
		case unix.ENODEV:
			return nil, ErrGone
		default:
			return nil, fmt.Errorf("the FUSE connection cannot be read: %w", r.err)
		}
	}
}

// buffer is a reply: a header, and behind it, on a page boundary, room for data.
type buffer struct {
	dev *device
	mem []byte // a page, then the data
	msg []byte // what fn writes
	err error
	fn  func(fd uintptr)
}

func newBuffer(d *device, size int) *buffer {
	mem := make([]byte, size+2*page)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(mem))) & (page - 1))
	b := &buffer{dev: d, mem: mem[skip : skip+page+size]}
	touch(b.mem)
	b.fn = func(fd uintptr) { b.err = write(fd, b.msg) }
	return b
}

// data is room for n bytes of a reply.
func (b *buffer) data(n int) []byte { return b.mem[page : page+n : page+n] }

// room is how many bytes data can give.
func (b *buffer) room() int { return len(b.mem) - page }

// reply answers the request with the first n bytes of data, or with an error.
func (b *buffer) reply(unique uint64, errno syscall.Errno, n int) error {
	b.msg = b.mem[page-outHeaderSize : page+n]
	putHeader(b.msg, unique, errno, n)
	if b.dev == nil { // a test looks at msg
		return nil
	}
	if err := b.dev.raw.Control(b.fn); err != nil {
		return b.dev.state(err)
	}
	return b.err
}

// touch has every page of b in memory. When a process is killed while the kernel copies
// to or from a page that is not, the copy fails, and the request with it, instead of
// being sent again to the next daemon.
func touch(b []byte) {
	for i := 0; i < len(b); i += page {
		b[i] = 1
	}
	clear(b)
}
