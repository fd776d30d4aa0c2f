package blobfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// File is what a name in the directory stands for. Its methods are called side by side.
type File interface {
	// Size is the number of bytes, the same at all times.
	Size() int64
	// ReadAt fills p wholly from offset off, or fails; off and len(p) lie within Size.
	// It returns soon after ctx ends: at the deadline, when the reader is killed, when
	// the file is removed or the Server stops. It does not keep p.
	ReadAt(ctx context.Context, p []byte, off int64) error
}

// Prompt is a File that may have bytes at hand. Its reads do not pass the limits on
// waiting reads, and cost no allocation.
type Prompt interface {
	File
	// ReadNow is ReadAt when that takes no longer than the local disk does, and
	// otherwise returns false at once; ReadAt is called then.
	ReadNow(p []byte, off int64) (bool, error)
}

// Counted is a File that hears who has it open. An EROFS has its devices open as long as it lives,
// in whichever mount, so this is how its end is known.
//
// Opened comes before the one who opens it is answered, Released after the kernel has let go, also
// of what was opened in the days of a former Server. A Server that dies in between has
// counted an open file too many, never one too few. Both return soon, and call no method
// of the Server.
type Counted interface {
	File
	Opened()
	Released()
}

// Options of a Server. The zero value is good.
type Options struct {
	// Workers answer what needs no waiting; 0 is one for each CPU, at least
	// eight, so that a disk has something to sort.
	Workers int
	// Reads is how many reads may wait in Files at once, 0 is 256. Each has a buffer
	// of 128 KiB.
	Reads int
	// ReadsPerFile is how many of them one file may have, 0 is 32.
	ReadsPerFile int
	// ReadTimeout is how long a read may wait before it fails, 0 is five minutes: a
	// File has better deadlines of its own, this one is for those that do not work.
	ReadTimeout time.Duration
	// Restore is how long after the begin of Run requests wait for a file that is not
	// there (yet), unless Restored is called before. 0 is not at all.
	Restore time.Duration
	// Log hears of failed reads, now and then. nil is slog.Default().
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.Workers <= 0 {
		o.Workers = max(8, runtime.GOMAXPROCS(0))
	}
	if o.Reads <= 0 {
		o.Reads = 256
	}
	if o.ReadsPerFile <= 0 {
		o.ReadsPerFile = 32
	}
	o.ReadsPerFile = min(o.ReadsPerFile, o.Reads)
	if o.ReadTimeout <= 0 {
		o.ReadTimeout = 5 * time.Minute
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return o
}

// stopGrace is how long Run waits for Files that do not heed the end of their context.
const stopGrace = 5 * time.Second

// Server answers the requests of one connection. Run does it; all other methods may be
// called before, while and after it.
type Server struct {
	o     Options
	dev   *device // nil in tests of the handlers alone
	err   error   // why there is no dev
	ctx   context.Context
	end   context.CancelFunc
	reads sync.WaitGroup // goroutines of reads and of watch
	count counters

	mu        sync.Mutex // guards following, and the fields of file and call
	files     map[uint64]*file
	names     map[string]*file
	sorted    []*file // by id
	restoring bool
	gone      map[uint64]bool // removed while restoring
	stopped   bool
	queue     reads
}

// file is one File in the directory.
type file struct {
	id     uint64
	name   string
	f      File
	prompt Prompt // f, or nil
	size   int64

	waiting calls // reads that wait for a goroutine
	running int   // goroutines in f.ReadAt
	inline  int   // workers in prompt.ReadNow
	removed bool
	idle    chan struct{} // closed when it is removed and nobody is in f
}

// New makes a Server for a connection that Connect gave. It uses a descriptor of its
// own: the caller closes dev.
func New(dev *os.File, o Options) *Server {
	s := newServer(o)
	s.dev, s.err = openDevice(dev)
	return s
}

func newServer(o Options) *Server {
	o = o.withDefaults()
	s := &Server{
		o:         o,
		files:     map[uint64]*file{},
		names:     map[string]*file{},
		gone:      map[uint64]bool{},
		restoring: o.Restore > 0,
		queue:     reads{pending: map[uint64]*call{}, signalled: map[*call]bool{}},
	}
	s.ctx, s.end = context.WithCancel(context.Background())
	return s
}

// Add puts f into the directory. An id is 2 or more, and belongs to the same bytes as
// long as the mount lives. It fails with an error that is os.ErrExist when the id or
// the name is taken.
func (s *Server) Add(id uint64, name string, f File) error {
	switch {
	case id <= rootNode || id >= 1<<62:
		return fmt.Errorf("%d cannot be the id of the file %q: it has to be 2 or more, and below 1<<62", id, name)
	case name == "" || name == "." || name == ".." || len(name) > maxName || strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("%q cannot be the name of file %d", name, id)
	case f.Size() < 0:
		return fmt.Errorf("the file %q has a size of %d bytes", name, f.Size())
	}
	n := &file{id: id, name: name, f: f, size: f.Size(), idle: make(chan struct{})}
	n.prompt, _ = f.(Prompt)
	s.mu.Lock()
	if s.files[id] != nil || s.names[name] != nil {
		s.mu.Unlock()
		return fmt.Errorf("file %d, %q: id or name is taken: %w", id, name, os.ErrExist)
	}
	s.files[id], s.names[name] = n, n
	at, _ := slices.BinarySearchFunc(s.sorted, id, func(f *file, id uint64) int { return compare(f.id, id) })
	s.sorted = slices.Insert(s.sorted, at, n)
	delete(s.gone, id)
	answers := s.unparkLocked(n)
	s.startReadsLocked()
	s.mu.Unlock()
	for _, a := range answers {
		s.send(a)
	}
	return nil
}

func compare(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// Remove takes a file out of the directory: its pending reads and all later ones fail
// with EIO, and the kernel forgets the name. The channel that is returned is closed when
// nobody is in the File's methods any more, so that it can be closed; nil when there is
// no such file.
func (s *Server) Remove(id uint64) <-chan struct{} {
	s.mu.Lock()
	if s.restoring {
		s.gone[id] = true
	}
	var failed []*call
	for _, c := range s.queue.pending {
		if c.node == id && c.op != opLookup && s.retireLocked(c) {
			failed = append(failed, c)
		}
	}
	f := s.files[id]
	if f != nil {
		delete(s.files, id)
		delete(s.names, f.name)
		s.sorted = slices.DeleteFunc(s.sorted, func(o *file) bool { return o == f })
		f.removed = true
		f.idleLocked()
	}
	invalidate := f != nil && !s.restoring && !s.stopped
	s.mu.Unlock()
	for _, c := range failed {
		s.fail(c, errRemoved)
	}
	if f == nil {
		return nil
	}
	// It has to wait for lookups that are under way, which a restore may hold up.
	if invalidate && s.dev != nil {
		_ = s.dev.send(invalEntry(f.name)) // the kernel may not know the name
	}
	return f.idle
}

// idleLocked closes idle if it is time.
func (f *file) idleLocked() {
	if f.removed && f.running == 0 && f.inline == 0 {
		select {
		case <-f.idle:
		default:
			close(f.idle)
		}
	}
}

// Restored tells that all files of the former daemon are there again: requests for
// others fail from now on.
func (s *Server) Restored() {
	s.mu.Lock()
	s.restoring = false
	clear(s.gone)
	lost := s.queue.parked.all()
	for _, c := range lost {
		s.retireLocked(c)
	}
	s.mu.Unlock()
	for _, c := range lost {
		s.fail(c, errUnknown)
	}
}

// Resend has the kernel send again what a former Server read and did not answer. Call
// it once after a takeover, when the former Server has ended.
func (s *Server) Resend() error {
	if s.dev == nil {
		return s.err
	}
	msg := make([]byte, outHeaderSize)
	native.PutUint32(msg, outHeaderSize)
	native.PutUint32(msg[4:], notifyResend)
	if err := s.dev.send(msg); err != nil {
		return fmt.Errorf("the kernel does not send requests again (Linux 6.9 does): %w", err)
	}
	return nil
}

// Run answers requests until ctx ends, then it returns nil; or until the connection
// breaks: ErrGone. Requests that are not answered by then are left to the next Server.
func (s *Server) Run(ctx context.Context) error {
	if s.dev == nil {
		return s.err
	}
	defer context.AfterFunc(ctx, s.dev.wake)()
	if s.o.Restore > 0 {
		restore := time.AfterFunc(s.o.Restore, s.Restored)
		defer restore.Stop()
	}
	errs := make(chan error, s.o.Workers)
	for range s.o.Workers {
		go func() {
			err := s.work(ctx)
			s.dev.wake() // one that cannot go on ends all
			errs <- err
		}()
	}
	var err error
	for range s.o.Workers {
		err = errors.Join(err, <-errs)
	}
	return errors.Join(err, s.stop())
}

// work is the loop of one worker.
func (s *Server) work(ctx context.Context) error {
	w := newWorker(s)
	for {
		b, err := w.in.next()
		switch {
		case errors.Is(err, os.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case errors.Is(err, ErrGone):
			if ctx.Err() != nil {
				return nil
			}
			return err
		case err != nil:
			return err
		}
		w.handle(b)
	}
}

// stop ends all reads without an answer.
func (s *Server) stop() error {
	s.mu.Lock()
	s.stopped = true
	left := slices.Collect(maps.Values(s.queue.pending))
	for _, c := range left {
		s.retireLocked(c)
	}
	s.mu.Unlock()
	s.end()
	for _, c := range left {
		c.release()
	}
	done := make(chan struct{})
	go func() { s.reads.Wait(); close(done) }()
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	select {
	case <-done:
		return nil
	case <-grace.C:
		return errors.New("reads of layer data go on though they were told to end")
	}
}

// Close gives up the connection's descriptor. Run ends if it still runs. The mount
// stays as long as anyone has the connection open.
func (s *Server) Close() error {
	s.end()
	if s.dev == nil {
		return nil
	}
	return s.dev.close()
}
