package layerfs

import (
	"context"
	"errors"
	"io"
	"sync/atomic"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/snapshotter/blobfs"
	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/index/published"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
)

// Status says how the layers of a node are mounted.
type Status struct {
	Mounts   int // in all
	Data     int // of these, that read plain files: the daemon has no part in them
	Layers   layerstore.Usage
	Quota    int64  // of the layers on disk; 0 is no bound
	Reads    uint64 // answered by the daemon
	Errors   uint64 // of these, with EIO
	InFlight int    // that wait
}

// Status tells how things are now.
func (f *FileSystem) Status() Status {
	st := Status{Layers: f.store.Usage(), Quota: f.o.Quota}
	st.Mounts, st.Data = f.mounts()
	r := f.link.server.Stats()
	st.Reads, st.Errors, st.InFlight = r.Reads, r.Errors, r.Waiting
	return st
}

// mounts counts them, and those that read plain files.
func (f *FileSystem) mounts() (all, data int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.places {
		if p.s == nil {
			continue
		}
		all++
		if p.kind == kindData {
			data++
		}
	}
	return all, data
}

// State is how far a layer has come.
type State string

// The states.
const (
	Lazy      State = "lazy"      // bytes of it are missing, and come when they are read
	Unchecked State = "unchecked" // all is there, and its index has still to be compared with it
	Complete  State = "complete"
	Forged    State = "forged" // its index shows what is not in the layer: no container starts from it
)

// States are all of them.
var States = [...]State{Lazy, Unchecked, Complete, Forged}

// Layer is a layer in the store.
type Layer struct {
	layerstore.Report
	Image  string // that was the first to have it mounted; "" when none is
	State  State
	Mounts int
	Data   int // of these, that read the plain file
	Opens  int // mounts and containers, also of images that were removed, that read by way of the daemon
}

// Layers tells of all layers in the store, sorted by digest.
func (f *FileSystem) Layers() []Layer {
	all := f.store.Report()
	out := make([]Layer, len(all))
	at := make(map[digest.Digest]*Layer, len(all))
	for i, r := range all {
		out[i] = Layer{Report: r, State: f.state(r)}
		at[r.Blob] = &out[i]
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for d, s := range f.served {
		if l := at[d]; l != nil {
			l.Image, l.Opens = s.target.Ref, s.opens
		}
	}
	for _, p := range f.places {
		if p.s == nil || at[p.s.digest] == nil {
			continue
		}
		l := at[p.s.digest]
		l.Mounts++
		if p.kind == kindData {
			l.Data++
		}
	}
	return out
}

func (f *FileSystem) state(r layerstore.Report) State {
	switch {
	case f.forged(r.Blob) != nil:
		return Forged
	case !r.Complete:
		return Lazy
	case f.claimed(r.Blob):
		return Unchecked
	}
	return Complete
}

// Counts is what was done since New.
type Counts struct {
	Mounts, Data  int    // as in Status
	Present       uint64 // reads that were answered at once
	Waits         blobfs.Histogram
	Bytes         uint64 // that were read
	Errors        uint64 // reads answered with EIO
	InFlight      int    // reads that wait now
	MountFailures int64
	Equal, Forged int64 // indexes that were compared with their layers: the same, and not
	Uncompared    int64 // such that could not be compared, and are tried again
	Quota         int64
}

// Counts tells of all layers together, and asks no disk.
func (f *FileSystem) Counts() Counts {
	r := f.link.server.Stats()
	c := Counts{
		Present: r.Reads - min(r.Late.Count, r.Reads), Waits: r.Late, Bytes: r.Bytes, Errors: r.Errors, InFlight: r.Waiting,
		MountFailures: f.failures.Load(), Equal: f.compares.equal.Load(), Forged: f.compares.forged.Load(),
		Uncompared: f.compares.failed.Load(), Quota: f.o.Quota,
	}
	c.Mounts, c.Data = f.mounts()
	return c
}

// comparing counts what comes of comparing indexes with layers.
type comparing struct {
	Source
	equal, forged, failed atomic.Int64
}

// Verify implements Source.
func (c *comparing) Verify(ctx context.Context, blob io.Reader, x *index.Index) error {
	err := c.Source.Verify(ctx, blob, x)
	switch {
	case err == nil:
		c.equal.Add(1)
	case errors.Is(err, published.ErrForged):
		c.forged.Add(1)
	case ctx.Err() == nil:
		c.failed.Add(1)
	}
	return err
}
