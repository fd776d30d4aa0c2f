package interop

import (
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/open"
	"github.com/docker-quay/docker-quay/fetcher/published"
)

func TestInterop(t *testing.T) {
	w := newWorld(t)
	// Each has a tracker of its own: two that share one would also download from each other.
	trackers := []struct {
		name  string
		start func(*testing.T) string
	}{
		{"our tracker", w.ourTracker},
		{"opentracker", func(t *testing.T) string { return w.opentracker(t, "http") }},
	}
	// The subtests of this one run side by side; what they share ends after it.
	t.Run("with", func(t *testing.T) {
		for _, c := range clients {
			t.Run(c.name+", from the web seed alone", func(t *testing.T) {
				t.Parallel()
				w.fromWebSeed(t, c)
			})
			for _, k := range trackers {
				t.Run(c.name+", through "+k.name, func(t *testing.T) {
					t.Parallel()
					w.thereAndBack(t, c, w.plain.With([]string{k.start(t)}, nil))
				})
			}
		}
		t.Run("ourselves, through opentracker over UDP", func(t *testing.T) {
			t.Parallel()
			p := w.plain.With([]string{w.opentracker(t, "udp")}, nil)
			w.seeder(t, p)
			w.download(t, p)
		})
	})
	if n := w.registry.Stats().Blobs; n < int64(len(clients))*w.layer.Size {
		t.Errorf("the registry served %d bytes of blobs to %d clients of its web seed", n, len(clients))
	}
}

// fromWebSeed has the client download from the registry: there are no trackers and no peers.
func (w *world) fromWebSeed(t *testing.T, c client) {
	_, path := c.run(t, w, w.webSeed)
	w.written(t, path)
}

// thereAndBack has the client download from a seeder of ours that it learns of from the tracker, and then a node of ours, which has
// nothing, from the client.
func (w *world) thereAndBack(t *testing.T, c client, p *published.Torrent) {
	seeder, st := w.seeder(t, p)
	_, path := c.run(t, w, p)
	w.written(t, path)
	if up := st.Stats().Uploaded; up < w.layer.Size {
		t.Errorf("our seeder sent %d bytes of %d", up, w.layer.Size)
	}
	if err := seeder.Close(); err != nil {
		t.Fatal(err)
	}
	w.download(t, p)
}

// seeder is a node of ours that has the layer and that the tracker knows.
func (w *world) seeder(t *testing.T, p *published.Torrent) (*open.Swarm, *open.Torrent) {
	t.Helper()
	s := w.swarm(t)
	to, err := s.Add(p, blobStorage{w.blob})
	if err != nil {
		t.Fatal(err)
	}
	within(t, "the tracker knows our seeder", func() (bool, string) {
		k := to.Stats().Trackers[0]
		return k.Err == nil && !k.Next.IsZero(), fmt.Sprintf("%+v", k)
	})
	return s, to
}

// download is by a node of ours that has nothing.
func (w *world) download(t *testing.T, p *published.Torrent) {
	t.Helper()
	blob := w.newBlob(t)
	tl, err := w.swarm(t).Add(p, blobStorage{blob})
	if err != nil {
		t.Fatal(err)
	}
	defer tl.Drop()
	for i := range blob.Pieces() {
		tl.Want(i)
	}
	within(t, "our node has all pieces", func() (bool, string) {
		return blob.Have() == blob.Size(), fmt.Sprintf("%d of %d bytes, %+v", blob.Have(), blob.Size(), tl.Stats())
	})
	if err := blob.Verify(t.Context()); err != nil {
		t.Error(err)
	}
}

// written waits until the client has written the whole layer.
func (w *world) written(t *testing.T, path string) {
	t.Helper()
	within(t, "the client has written the layer", func() (bool, string) {
		f, err := os.Open(path)
		if err != nil {
			return false, err.Error()
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil || info.Size() != w.layer.Size {
			return false, fmt.Sprintf("%d bytes of %d", info.Size(), w.layer.Size)
		}
		h := digest.SHA256.Digester()
		if _, err := io.Copy(h.Hash(), f); err != nil {
			return false, err.Error()
		}
		return h.Digest() == w.layer.Digest, "its bytes are not those of the layer"
	})
}
