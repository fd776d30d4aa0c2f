package swarm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pieceSize of all blobs in these tests.
const pieceSize = 256 << 10

// secret of the cluster in these tests.
var secret = trust.NewSecret()

// blob is content made up for a test.
type blob struct {
	digest digest.Digest
	data   []byte
}

func newBlob(size int, seed byte) blob {
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return blob{digest.FromBytes(data), data}
}

func (b blob) pieces() int { return numPieces(int64(len(b.data)), pieceSize) }

func (b blob) piece(i int) []byte {
	return b.data[i*pieceSize : min((i+1)*pieceSize, len(b.data))]
}

// memory is a Storage in memory that knows what its blob should be and checks every piece marked.
type memory struct {
	blob blob

	mu     sync.Mutex
	data   []byte
	held   []bool
	from   []string // suppliers by piece
	marked chan int // every piece marked, in order
	hook   func(i int, peer string) error
	closed bool
	late   int // calls after closed
	wrong  int // pieces marked with wrong content
	again  int // pieces marked twice
	ioErr  error
}

func newMemory(b blob) *memory {
	return &memory{
		blob: b, data: make([]byte, len(b.data)), held: make([]bool, b.pieces()), from: make([]string, b.pieces()),
		marked: make(chan int, 10*b.pieces()+10),
	}
}

// fill puts pieces in, as if they came from the origin.
func (m *memory) fill(pieces ...int) *memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, i := range pieces {
		copy(m.data[i*pieceSize:], m.blob.piece(i))
		m.held[i] = true
	}
	return m
}

func (m *memory) fillAll() *memory {
	for i := range m.held {
		m.fill(i)
	}
	return m
}

func (m *memory) called() {
	if m.closed {
		m.late++
	}
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.called()
	for i := off / pieceSize; i*pieceSize < off+int64(len(p)) && int(i) < len(m.held); i++ {
		if !m.held[i] {
			return 0, errors.New("read of a piece that is not held")
		}
	}
	n := copy(p, m.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.called()
	if m.held[off/pieceSize] {
		return 0, errors.New("write to a piece that is held")
	}
	if m.ioErr != nil {
		return 0, m.ioErr
	}
	return copy(m.data[off:], p), nil
}

func (m *memory) Has(i int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.called()
	return m.held[i]
}

func (m *memory) MarkPiece(i int, peer string) error {
	m.mu.Lock()
	m.called()
	hook := m.hook
	m.mu.Unlock()
	if hook != nil {
		if err := hook(i, peer); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.held[i] {
		m.again++
	}
	want := m.blob.piece(i)
	got := m.data[i*pieceSize : i*pieceSize+len(want)]
	if crc32.ChecksumIEEE(got) != crc32.ChecksumIEEE(want) {
		m.wrong++
	}
	m.held[i] = true
	m.from[i] = peer
	m.marked <- i
	return nil
}

func (m *memory) complete() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !slices.Contains(m.held, false)
}

// check that all is there, right, and was done right.
func (m *memory) check(t testing.TB) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !bytes.Equal(m.data, m.blob.data) {
		t.Error("the content differs")
	}
	if m.wrong != 0 || m.again != 0 {
		t.Errorf("%d pieces marked with wrong content, %d marked twice", m.wrong, m.again)
	}
}

// node is a swarm with its listener.
type node struct {
	*Swarm
	id   *trust.Identity
	addr netip.AddrPort
	ln   *trust.Listener
}

type nodeOption func(*Options)

func noSeed(o *Options) { o.Seed = false }
func upload(l *rate.Limiter) nodeOption {
	return func(o *Options) { o.UploadLimit = l }
}
func download(l *rate.Limiter) nodeOption {
	return func(o *Options) { o.DownloadLimit = l }
}

func newNode(t testing.TB, opts ...nodeOption) *node {
	t.Helper()
	return newNodeOf(t, secret, opts...)
}

func newNodeOf(t testing.TB, s trust.Secret, opts ...nodeOption) *node {
	t.Helper()
	id, err := s.Identity()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := trust.Listen("127.0.0.1", trust.PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	o := Options{ID: id, Listener: ln.Swarm(), Seed: true}
	for _, f := range opts {
		f(&o)
	}
	sw, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{sw, id, ln.Addr(), ln}
	t.Cleanup(func() { n.close(t) })
	return n
}

func (n *node) close(t testing.TB) {
	t.Helper()
	start := time.Now()
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("Close took %v", d)
	}
}

func (n *node) add(t testing.TB, m *memory) *Torrent {
	t.Helper()
	to, err := n.Add(m.blob.digest, int64(len(m.blob.data)), pieceSize, m)
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// wantAll wishes for all pieces; m's missing ones arrive.
func wantAll(to *Torrent) {
	for i := range to.pieces {
		to.Want(i)
	}
}

// wait until ok, at most a while.
func wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatal("waited in vain: ", what)
		case <-tick.C:
		}
	}
}

// never checks that ok stays false for d.
func never(t testing.TB, what string, d time.Duration, ok func() bool) {
	t.Helper()
	end := time.After(d)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-end:
			return
		case <-tick.C:
			if ok() {
				t.Fatal("happened though it must not: ", what)
			}
		}
	}
}

func addrs(nodes ...*node) (a []netip.AddrPort) {
	for _, n := range nodes {
		a = append(a, n.addr)
	}
	return a
}

func noLog() *slog.Logger { return slog.New(slog.DiscardHandler) }

func (n *node) String() string { return fmt.Sprintf("%s at %v", n.id.ID()[:8], n.addr) }
