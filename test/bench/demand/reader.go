package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/test/bench"
)

// readerArgument makes this program a reader; the next argument is its readerConfig.
const readerArgument = "demand-reader"

const (
	// maxReads is where a reader stops: p99 then has ten reads above it.
	maxReads = 1000
	// maxPause bounds the pause between two reads during a download; it is half of that on average: a program that starts reads and
	// computes in turns. Without any the download would hold back all the time, and there would be nothing to measure.
	maxPause = 100 * time.Millisecond
	// findWithin bounds how long the reader waits for the holder to answer its hello.
	findWithin = 10 * time.Second
)

// readerConfig is what a reader is told.
type readerConfig struct {
	Store, Secret, Listen, Peer, CertsDir, Ref string
	Layer                                      ocispec.Descriptor
	File                                       string // with the right bytes of the layer
	Bulk                                       *ocispec.Descriptor
}

// result is what it tells: milliseconds.
type result struct {
	Reads    bench.Series `json:"reads"`
	First    float64      `json:"first"`
	BulkRate float64      `json:"bulk_rate"` // 10^6 bytes a second
	FromPeer float64      `json:"from_peer"` // percent
	Failure  string       `json:"failure"`
}

func reader(raw string) (err error) {
	var c readerConfig
	if err := json.Unmarshal([]byte(raw), &c); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), readerWithin)
	defer cancel()
	right, err := os.Open(c.File)
	if err != nil {
		return err
	}
	defer right.Close()
	st, err := store.Open(store.Options{Dir: c.Store})
	if err != nil {
		return err
	}
	defer st.Close()
	secret, err := trust.Load(c.Secret)
	if err != nil {
		return err
	}
	f, err := fetcher.New(ctx, fetcher.Options{Store: st, Secret: &secret, Listen: c.Listen, Peers: []string{c.Peer}, Ephemeral: true})
	if err != nil {
		return err
	}
	defer f.Close()
	if err := find(ctx, f); err != nil {
		return err
	}
	ref, err := reference.ParseNormalizedNamed(c.Ref)
	if err != nil {
		return err
	}
	o, err := origin.New(origin.Options{HostDirs: []string{c.CertsDir}, Credentials: func(string) (string, string, error) { return "", "", nil }})
	if err != nil {
		return err
	}
	defer o.Close()
	repository, err := o.Repository(ref)
	if err != nil {
		return err
	}
	open := func(d ocispec.Descriptor) (*fetcher.Blob, error) {
		return f.Blob(ctx, ref, d, fetcher.BlobOptions{Origin: repository})
	}
	layer, err := open(c.Layer)
	if err != nil {
		return err
	}
	defer layer.Close()
	// The same blob once more, to see which pieces are here.
	pieces, err := st.Blob(ctx, c.Layer.Digest, c.Layer.Size)
	if err != nil {
		return err
	}
	defer pieces.Close()
	var bulk *fetcher.Blob
	if c.Bulk != nil {
		if bulk, err = open(*c.Bulk); err != nil {
			return err
		}
		defer bulk.Close()
	}
	res := read(ctx, layer, pieces, bulk, right)
	return json.NewEncoder(os.Stdout).Encode(res)
}

// find waits for the holder.
func find(ctx context.Context, f *fetcher.Fetcher) error {
	ctx, cancel := context.WithTimeout(ctx, findWithin)
	defer cancel()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for len(f.Members()) == 0 {
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("the holder does not answer: %w", ctx.Err())
		}
	}
	return nil
}

// read reads pieces that are not here, in random order, each once, until there are none, the download is complete, or it has
// enough.
func read(ctx context.Context, layer *fetcher.Blob, pieces *store.Blob, bulk *fetcher.Blob, right *os.File) (res result) {
	// The order is the same in every run.
	random := rand.New(rand.NewPCG(1, 2))
	begun := time.Now()
	done := func() error { return nil }
	for i, piece := range random.Perm(pieces.Pieces()) {
		if bulk != nil && i > 0 {
			if bulk.Complete() || pause(ctx, random) != nil {
				break
			}
		}
		if pieces.Has(piece) {
			continue
		}
		took, err := readOne(ctx, layer, pieces, piece, random, right)
		if err != nil {
			res.Failure = err.Error()
			break
		}
		ms := float64(took) / float64(time.Millisecond)
		if i == 0 {
			// The first one finds the holder; the download starts after it.
			res.First = ms
			if bulk != nil {
				begun = time.Now()
				done = download(ctx, bulk)
			}
			continue
		}
		if res.Reads = append(res.Reads, ms); len(res.Reads) == maxReads {
			break
		}
	}
	got := []fetcher.Progress{layer.Progress()}
	if bulk != nil {
		p := bulk.Progress()
		res.BulkRate = float64(p.FromPeers+p.FromOrigin) / 1e6 / time.Since(begun).Seconds()
		if err := done(); err != nil && res.Failure == "" {
			res.Failure = "the download: " + err.Error()
		}
		if p.Digest != got[0].Digest {
			got = append(got, p)
		}
	}
	var peers, all int64
	for _, p := range got {
		peers += p.FromPeers
		all += p.FromPeers + p.FromOrigin
	}
	res.FromPeer = 100 * float64(peers) / float64(max(all, 1))
	return res
}

// download fetches a blob as somebody who waits for it does, which gives less way to reads than a fetch that nobody waits
// for. The function it returns waits for the end.
func download(ctx context.Context, b *fetcher.Blob) (wait func() error) {
	done := make(chan error, 1)
	go func() { done <- b.Wait(ctx) }()
	return func() error { return <-done }
}

func pause(ctx context.Context, random *rand.Rand) error {
	return bench.Wait(ctx, time.Duration(random.Int64N(int64(maxPause))))
}

var errBytes = errors.New("wrong bytes")

// readOne reads from a random place of a piece and checks what it got.
func readOne(ctx context.Context, layer *fetcher.Blob, pieces *store.Blob, piece int, random *rand.Rand, right *os.File) (time.Duration, error) {
	off, n := pieces.PieceRange(piece)
	p := make([]byte, min(readSize, n))
	off += random.Int64N(n - int64(len(p)) + 1)
	begun := time.Now()
	if _, err := layer.ReadAt(ctx, p, off, fetcher.Demand); err != nil {
		return 0, fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	took := time.Since(begun)
	want := make([]byte, len(p))
	if _, err := right.ReadAt(want, off); err != nil {
		return 0, err
	}
	if !bytes.Equal(p, want) {
		return 0, fmt.Errorf("read %d bytes at %d: %w", len(p), off, errBytes)
	}
	return took, nil
}
