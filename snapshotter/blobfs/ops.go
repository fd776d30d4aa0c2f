package blobfs

import (
	"errors"
	"os"
	"slices"
	"syscall"
)

// worker answers requests one at a time. It owns its buffers.
type worker struct {
	s   *Server
	in  *reader
	out *buffer
}

func newWorker(s *Server) *worker {
	w := &worker{s: s, out: newBuffer(s.dev, maxRead)}
	if s.dev != nil {
		w.in = newReader(s.dev)
	}
	return w
}

// handle answers the request in b, now or later.
func (w *worker) handle(b []byte) {
	r, err := parse(b)
	if err != nil {
		return // without a header there is nobody to answer
	}
	switch r.op {
	case opRead:
		w.read(r)
	case opLookup:
		name, ok := r.name()
		switch {
		case !ok:
			w.error(r, syscall.EINVAL)
		case r.node != rootNode:
			w.error(r, syscall.ENOTDIR)
		default:
			w.metadata(r, name)
		}
	case opGetattr:
		w.metadata(r, "")
	case opOpen:
		if len(r.arg) < 4 {
			w.error(r, syscall.EINVAL)
		} else if native.Uint32(r.arg)&syscall.O_ACCMODE != syscall.O_RDONLY {
			w.error(r, syscall.EROFS)
		} else {
			w.metadata(r, "")
		}
	case opReaddir, opReaddirplus:
		w.readdir(r)
	case opOpendir:
		w.reply(r, clean(w.out.data(openOutSize)))
	case opStatfs:
		p := clean(w.out.data(statfsSize))
		native.PutUint32(p[40:], page) // bsize
		native.PutUint32(p[44:], maxName)
		native.PutUint32(p[48:], page) // frsize
		w.reply(r, p)
	case opInit:
		w.init(r)
	case opInterrupt:
		if len(r.arg) >= 8 {
			w.s.interrupt(native.Uint64(r.arg))
		}
	case opForget, opBatchForget: // ids are not counted; and there is no answer
	case opRelease:
		w.reply(r, nil)
		w.s.released(r.node)
	case opReleasedir, opDestroy:
		w.reply(r, nil)
	default: // FLUSH too: the kernel never sends it again
		w.error(r, syscall.ENOSYS)
	}
}

// released tells a File that is interested.
func (s *Server) released(node uint64) {
	s.mu.Lock()
	f := s.files[node]
	s.mu.Unlock()
	if f == nil {
		return
	}
	if c, ok := f.f.(Counted); ok {
		c.Released()
	}
}

// opened tells a File that it is about to be.
func (f *file) opened(op uint32) {
	if c, ok := f.f.(Counted); ok && op == opOpen {
		c.Opened()
	}
}

func clean(p []byte) []byte {
	clear(p)
	return p
}

// reply answers with p, which is w.out.data.
func (w *worker) reply(r request, p []byte) { w.s.replied(w.out.reply(r.unique, 0, len(p))) }

func (w *worker) error(r request, errno syscall.Errno) {
	w.s.replied(w.out.reply(r.unique, errno, 0))
}

// init agrees with the kernel on how to talk. It comes once in the life of a mount.
func (w *worker) init(r request) {
	if len(r.arg) < 16 {
		w.error(r, syscall.EINVAL)
		return
	}
	major, minor, readahead := native.Uint32(r.arg), native.Uint32(r.arg[4:]), native.Uint32(r.arg[8:])
	if major < fuseMajor {
		w.error(r, syscall.EPROTO)
		return
	}
	p := clean(w.out.data(initOutSize))
	native.PutUint32(p, fuseMajor)
	native.PutUint32(p[4:], min(minor, fuseMinor))
	if major == fuseMajor { // a newer kernel asks again, with the major version it hears
		native.PutUint32(p[8:], readahead)
		native.PutUint32(p[12:], flagAsyncRead|flagDoReaddirplus|flagReaddirAuto|flagAsyncDIO|
			flagParallelDirops|flagMaxPages|flagInitExt)
		native.PutUint16(p[16:], maxBackground)
		native.PutUint16(p[18:], maxBackground) // congestion threshold
		native.PutUint32(p[20:], maxWrite)
		native.PutUint32(p[24:], 1) // times are exact to the nanosecond
		native.PutUint16(p[28:], maxRead/page)
		native.PutUint32(p[32:], flag2HasResend)
	}
	w.reply(r, p)
}

// metadata answers LOOKUP, GETATTR and OPEN, or parks them until their file is there.
func (w *worker) metadata(r request, name string) {
	if r.op != opLookup && r.node == rootNode {
		if r.op == opOpen {
			w.error(r, syscall.EISDIR)
			return
		}
		p := clean(w.out.data(attrOutSize))
		native.PutUint64(p, valid)
		putAttr(p[16:], rootNode, 0)
		w.reply(r, p)
		return
	}
	s := w.s
	s.mu.Lock()
	f := s.files[r.node]
	if r.op == opLookup {
		f = s.names[name]
	}
	parked := f == nil && s.parkLocked(r, name, 0, 0)
	s.mu.Unlock()
	switch {
	case parked:
	case f != nil:
		f.opened(r.op)
		w.reply(r, body(w.out.data(entrySize), r.op, f))
	case r.op == opLookup:
		w.error(r, syscall.ENOENT)
	default:
		w.error(r, syscall.EIO)
	}
}

// parkLocked lets a request wait for a file that is not there, if it may come.
func (s *Server) parkLocked(r request, name string, off int64, size int) bool {
	if !s.restoring || r.op != opLookup && s.gone[r.node] {
		return false
	}
	return s.waitLocked(&call{op: r.op, unique: r.unique, node: r.node, pid: r.pid, off: off, size: size, name: name}, nil)
}

// body writes the answer to a LOOKUP, GETATTR or OPEN of f.
func body(p []byte, op uint32, f *file) []byte {
	clear(p)
	switch op {
	case opLookup:
		putEntry(p, f.id, f.size)
		return p[:entrySize]
	case opGetattr:
		native.PutUint64(p, valid)
		putAttr(p[16:], f.id, f.size)
		return p[:attrOutSize]
	default:
		native.PutUint64(p, f.id)
		native.PutUint32(p[8:], openKeepCache|openNoFlush)
		return p[:openOutSize]
	}
}

// describe is such an answer as a message.
func describe(op uint32, unique uint64, f *file) []byte {
	msg := make([]byte, outHeaderSize+entrySize)
	p := body(msg[outHeaderSize:], op, f)
	putHeader(msg, unique, 0, len(p))
	return msg[:outHeaderSize+len(p)]
}

// clip is how much of a read of n bytes at off lies within the file.
func (f *file) clip(off int64, n int) int { return int(min(int64(n), max(0, f.size-off))) }

// read answers a READ from what is at hand, or lets it wait.
func (w *worker) read(r request) {
	off, size, ok := r.readRange()
	if !ok {
		w.error(r, syscall.EINVAL)
		return
	}
	s := w.s
	s.mu.Lock()
	f := s.files[r.node]
	if f == nil {
		parked := s.parkLocked(r, "", off, size)
		s.mu.Unlock()
		if !parked {
			s.logFailure(nil, r.node, off, size, errUnknown)
			w.error(r, syscall.EIO)
		}
		return
	}
	n := f.clip(off, size)
	if f.prompt != nil && n <= maxRead || n == 0 {
		f.inline++
		s.mu.Unlock()
		done, err := n == 0, error(nil)
		if !done {
			done, err = f.prompt.ReadNow(w.out.data(n), off)
		}
		if err != nil {
			s.logFailure(f, r.node, off, n, err)
			w.error(r, syscall.EIO)
		} else if done {
			s.count.reads.Add(1)
			s.count.bytes.Add(uint64(n))
			s.replied(w.out.reply(r.unique, 0, n))
		}
		s.mu.Lock()
		f.inline--
		f.idleLocked()
		if done || err != nil {
			s.mu.Unlock()
			return
		}
	}
	err := errRemoved
	if !f.removed {
		err = nil
		if !s.waitLocked(&call{op: opRead, unique: r.unique, node: r.node, pid: r.pid, off: off, size: n}, f) {
			err = errTooMany
		}
		s.startReadsLocked()
	}
	s.mu.Unlock()
	if err != nil {
		s.logFailure(f, r.node, off, n, err)
		w.error(r, syscall.EIO)
	}
}

// readdir lists the directory. The offset of "." is 1, of ".." 2, of a file its id + 1:
// what follows an offset is the same in every daemon.
func (w *worker) readdir(r request) {
	off, size, ok := r.readRange()
	if !ok || r.node != rootNode {
		w.error(r, syscall.EINVAL)
		return
	}
	b := w.out.data(min(size, maxRead))[:0] // its capacity is what fits
	plus, fits := r.op == opReaddirplus, true
	if off < 1 {
		b, fits = appendDirent(b, plus, rootNode, 1, 0, ".")
	}
	if off < 2 && fits {
		b, fits = appendDirent(b, plus, rootNode, 2, 0, "..")
	}
	w.s.mu.Lock()
	at, _ := slices.BinarySearchFunc(w.s.sorted, uint64(off), func(f *file, off uint64) int { return compare(f.id+1, off+1) })
	for _, f := range w.s.sorted[at:] {
		if !fits {
			break
		}
		b, fits = appendDirent(b, plus, f.id, f.id+1, f.size, f.name)
	}
	w.s.mu.Unlock()
	w.reply(r, b)
}

// invalEntry is the message that has the kernel forget a name.
func invalEntry(name string) []byte {
	msg := make([]byte, outHeaderSize+16+len(name)+1)
	native.PutUint32(msg, uint32(len(msg)))
	native.PutUint32(msg[4:], notifyInvalEntry)
	native.PutUint64(msg[16:], rootNode)
	native.PutUint32(msg[24:], uint32(len(name)))
	copy(msg[32:], name)
	return msg
}

// send writes a message that has no buffer.
func (s *Server) send(msg []byte) {
	if s.dev != nil {
		s.replied(s.dev.send(msg))
	}
}

func (s *Server) sendError(unique uint64, errno syscall.Errno) {
	msg := make([]byte, outHeaderSize)
	putHeader(msg, unique, errno, 0)
	s.send(msg)
}

// replied hears how writing an answer went. There is nothing to do about a failure: the
// connection is gone or ours is closed, and the next Server is asked again.
func (s *Server) replied(err error) {
	if err != nil && !errors.Is(err, os.ErrClosed) && !errors.Is(err, syscall.ENODEV) {
		s.o.Log.Warn("the kernel does not take an answer on the FUSE connection", "error", err)
	}
}
