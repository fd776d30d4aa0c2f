package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/rig"
)

// plainBytes is what the candidate plain moves at most in one run: the registry's link carries all of it, 21 s at 200 Mbit/s. With many
// nodes the blob is smaller for that; its time grows with the size and nothing else.
const plainBytes = 512 * mib

// plainScenario is the same with a blob that the registry alone can give to all in reasonable time.
func plainScenario(s *scenario) scenario {
	p := *s
	for p.size*int64(p.nodes) > plainBytes {
		p.size /= 2
	}
	return p
}

// playPlain has every node get the blob from the registry by itself.
func (w *world) playPlain(ctx context.Context, s *scenario, b blob) (out outcome, err error) {
	idle, err := bench.MachineNow()
	if err != nil {
		return out, err
	}
	if err := bench.Wait(ctx, settle); err != nil {
		return out, err
	}
	start, err := bench.MachineNow()
	if err != nil {
		return out, err
	}
	out.before = start.Busy(idle)
	nodes := w.network.Nodes()[:s.nodes]
	before, err := received(nodes)
	if err != nil {
		return out, err
	}
	w.registry.ResetStats()
	took := make([]time.Duration, len(nodes))
	errs := make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			begun := time.Now()
			errs[i] = get(ctx, n, b)
			took[i] = time.Since(begun)
		})
	}
	wg.Wait()
	end, err := bench.MachineNow()
	if err != nil {
		return out, err
	}
	after, err := received(nodes)
	if err != nil {
		return out, err
	}
	for i := range nodes {
		if errs[i] != nil {
			// Without docker quay's part in it: the world's fault.
			return out, fmt.Errorf("node %d, plain HTTP: %w", i+1, errs[i])
		}
	}
	wanted := b.size * int64(len(nodes))
	out.took, out.rest = took, took
	out.busy = end.Busy(start)
	out.copies = float64(w.registry.Stats().Blobs) / float64(b.size)
	out.waste = float64(after-before-wanted) / float64(wanted)
	return out, nil
}

func received(nodes []*rig.Node) (n int64, err error) {
	for _, node := range nodes {
		t, err := node.Traffic()
		if err != nil {
			return 0, err
		}
		n += t.Received
	}
	return n, nil
}

// get reads a blob from the registry, in a node's namespace, and checks it.
func get(ctx context.Context, n *rig.Node, b blob) error {
	transport := &http.Transport{DialContext: n.DialContext, DisableCompression: true}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.url, nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", b.url, resp.Status)
	}
	h := sha256.New()
	if _, err := io.Copy(h, resp.Body); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != b.digest.Encoded() {
		return fmt.Errorf("got digest %s instead of %s", got, b.digest)
	}
	return nil
}
