package open

import (
	"bytes"
	"crypto/sha1"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// layer is content made up for a test.
type layer struct {
	digest digest.Digest
	data   []byte
}

func newLayer(size int, seed byte) layer {
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return layer{digest.FromBytes(data), data}
}

func (l layer) pieces() int {
	return layout{size: int64(len(l.data)), sp: store.PieceSize(int64(len(l.data)))}.storePieces()
}

// torrent is its metainfo, as any maker of torrents would write it.
func (l layer) torrent(t testing.TB, pieceLength int, private bool, trackers ...string) *published.Torrent {
	t.Helper()
	info := metainfo.Info{Name: l.digest.Encoded(), Length: int64(len(l.data)), PieceLength: int64(pieceLength)}
	for off := 0; off < len(l.data); off += pieceLength {
		h := sha1.Sum(l.data[off:min(off+pieceLength, len(l.data))])
		info.Pieces = append(info.Pieces, h[:]...)
	}
	if private {
		info.Private = &private
	}
	raw := bencode.MustMarshal(info)
	p := &published.Torrent{
		Layer:    ocispec.Descriptor{Digest: l.digest, Size: int64(len(l.data))},
		MetaInfo: &metainfo.MetaInfo{InfoBytes: raw},
		Info:     info, InfoHash: metainfo.HashBytes(raw), Private: private,
	}
	for _, u := range trackers {
		p.Trackers = append(p.Trackers, []string{u})
	}
	return p
}

// memory is a Storage in memory that knows what its layer should be.
type memory struct {
	layer layer
	size  int64 // of a piece

	mu     sync.Mutex
	data   []byte
	held   []bool
	marked chan int // every piece marked, in order
	mark   func(i int, peer string) error
	strict func(i int) bool // whether piece i may be written; nil: every
	faults []string         // what was done against the contract of Storage
	ioErr  error
	from   map[string]int
}

func newMemory(l layer) *memory {
	n := l.pieces()
	return &memory{
		layer: l, size: store.PieceSize(int64(len(l.data))), data: make([]byte, len(l.data)),
		held: make([]bool, n), marked: make(chan int, 10*n+10), from: make(map[string]int),
	}
}

// fill puts pieces in, as if they came from the origin; all of them when none is named.
func (m *memory) fill(pieces ...int) *memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(pieces) == 0 {
		for i := range m.held {
			pieces = append(pieces, i)
		}
	}
	for _, i := range pieces {
		off := int64(i) * m.size
		end := min(off+m.size, int64(len(m.data)))
		copy(m.data[off:end], m.layer.data[off:end])
		m.held[i] = true
	}
	return m
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := off / m.size; i*m.size < off+int64(len(p)) && int(i) < len(m.held); i++ {
		if !m.held[i] {
			m.faults = append(m.faults, "a piece that is not held was read")
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
	i := int(off / m.size)
	switch {
	case off/m.size != (off+int64(len(p))-1)/m.size:
		m.faults = append(m.faults, "one write to two pieces")
	case m.strict != nil && !m.strict(i):
		m.faults = append(m.faults, "a piece was written that nobody wished for")
	case !bytes.Equal(p, m.layer.data[off:off+int64(len(p))]):
		m.faults = append(m.faults, "wrong bytes were written")
	}
	if m.held[i] {
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
	return m.held[i]
}

func (m *memory) MarkPiece(i int, peer string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mark != nil {
		if err := m.mark(i, peer); err != nil {
			return err
		}
	}
	off := int64(i) * m.size
	end := min(off+m.size, int64(len(m.data)))
	if !bytes.Equal(m.data[off:end], m.layer.data[off:end]) {
		m.faults = append(m.faults, "a piece was marked that was not wholly written")
	}
	if m.held[i] {
		m.faults = append(m.faults, "a piece was marked twice")
	}
	m.held[i] = true
	m.from[peer]++
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
	if !bytes.Equal(m.data, m.layer.data) {
		t.Error("the content differs")
	}
	if len(m.faults) > 0 {
		t.Errorf("%d faults, the first: %s", len(m.faults), m.faults[0])
	}
}

// newSwarm is a swarm that listens on an address of its own on loopback: peers are told apart, and banned, by address.
func newSwarm(t testing.TB, o Options) *Swarm {
	t.Helper()
	if o.Listen == "" {
		o.Listen = nextAddr().String()
	}
	o.noLocalDiscovery = true
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		start := time.Now()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("closing took %v", d)
		}
	})
	return s
}

var addrs struct {
	sync.Mutex
	last netip.Addr
}

// nextAddr is a fresh address of 127.0.0.0/8.
func nextAddr() netip.Addr {
	addrs.Lock()
	defer addrs.Unlock()
	if !addrs.last.IsValid() {
		addrs.last = netip.MustParseAddr("127.9.0.1")
	}
	addrs.last = addrs.last.Next()
	return addrs.last
}

func addrOf(s *Swarm) []netip.AddrPort {
	return []netip.AddrPort{netip.MustParseAddrPort(s.ln.Addr().String())}
}

func add(t testing.TB, s *Swarm, p *published.Torrent, st Storage) *Torrent {
	t.Helper()
	to, err := s.Add(p, st)
	if err != nil {
		t.Fatal(err)
	}
	return to
}

func wantAll(to *Torrent) {
	for i := range to.pieces.storePieces() {
		to.Want(i)
	}
}

// wait for a condition, 10 s at most.
func wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after 10 s, not yet: %s", what)
		}
	}
}

// never is for what must not happen, watched for as long as d.
func never(t testing.TB, what string, d time.Duration, bad func() bool) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if bad() {
			t.Fatalf("it happened: %s", what)
		}
	}
}

// noLog keeps the library quiet.
var noLog = slog.New(slog.DiscardHandler)
