package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/daemon"
	"github.com/docker-quay/docker-quay/test/rig"
)

// pull is one node's part in a round.
type pull struct {
	round  *round
	number int // from 1
	node   *rig.Node
	delay  time.Duration // after the start; a node with one is started then
	daemon *daemon.Daemon
	killed atomic.Bool
	cpu    time.Duration // that the daemon had used when it was killed

	took time.Duration
	err  error

	mu       sync.Mutex // guards following
	sessions []*api.Session
	ended    []fetcher.Progress // of the sessions that are closed, the layers only
}

// start starts the node's daemon.
func (p *pull) start(ctx context.Context) (err error) {
	r := p.round
	o := daemon.Options{
		Rig: r.world.rig, Name: fmt.Sprintf("quay-%d-%s", r.world.rounds, p.node.Name), Dir: filepath.Join(r.dir, p.node.Name),
		Node: p.node, Secret: r.world.secret, Peers: r.peers, Registry: r.world.registry,
	}
	if r.world.logs {
		o.Config = "[log]\nlevel = \"debug\"\n"
	}
	p.daemon, err = daemon.Start(ctx, o)
	return err
}

// run pulls all of the round's images at once and takes the time until the node's store has them, digests checked.
func (p *pull) run(ctx context.Context) {
	p.err = func() error {
		if p.delay > 0 {
			if err := bench.Wait(ctx, p.delay); err != nil {
				return err
			}
			if err := p.start(ctx); err != nil {
				return err
			}
		}
		client, _, err := api.Dial(ctx, p.daemon.Socket)
		if err != nil {
			return err
		}
		defer client.Close()
		begun := time.Now()
		g, ctx := errgroup.WithContext(ctx)
		for _, b := range p.round.blobs {
			g.Go(func() error { return p.image(ctx, client, b.ref) })
		}
		err = g.Wait()
		p.took = time.Since(begun)
		return err
	}()
}

func (p *pull) image(ctx context.Context, client *api.Client, ref string) error {
	s, err := client.Image(ctx, api.ImageRequest{Ref: ref})
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.sessions = append(p.sessions, s)
	p.mu.Unlock()
	if err := s.Fetch(ctx); err != nil {
		return err // with its session open, for state
	}
	layers := layersOf(s)
	for _, l := range layers {
		if l.State != fetcher.Complete || l.Have != l.Size {
			err = errors.Join(err, fmt.Errorf("the fetch of %s ended, but %s is %s with %d of %d bytes", ref, l.Digest, l.State, l.Have, l.Size))
		}
	}
	p.mu.Lock()
	p.ended = append(p.ended, layers...)
	for i := range p.sessions {
		if p.sessions[i] == s {
			p.sessions = append(p.sessions[:i], p.sessions[i+1:]...)
			break
		}
	}
	p.mu.Unlock()
	return errors.Join(err, s.Close())
}

// layersOf is how far a session's layers are; the config, which comes first, is not counted.
func layersOf(s *api.Session) []fetcher.Progress {
	if all := s.Progress(); len(all) > 1 {
		return all[1:]
	}
	return nil
}

// progress is how far all layers are.
func (p *pull) progress() []fetcher.Progress {
	p.mu.Lock()
	all := append([]fetcher.Progress(nil), p.ended...)
	open := append([]*api.Session(nil), p.sessions...)
	p.mu.Unlock()
	for _, s := range open {
		all = append(all, layersOf(s)...)
	}
	return all
}

func (p *pull) fromOrigin() (n int64) {
	for _, l := range p.progress() {
		n += l.FromOrigin
	}
	return n
}

// state tells where the layers stand, for the message of a failure.
func (p *pull) state() string {
	var b strings.Builder
	for _, l := range p.progress() {
		fmt.Fprintf(&b, "  %.19s… %s, %d of %d MiB, %d from the registry, %d from %d peers, %d given; %s\n", l.Digest, l.State,
			l.Have/mib, l.Size/mib, l.FromOrigin/mib, l.FromPeers/mib, l.Peers, l.Uploaded/mib, l.Note)
	}
	if p.daemon != nil && p.daemon.Process != nil {
		fmt.Fprintf(&b, "  the daemon's last words:\n%s\n", p.daemon.Process.Tail(5))
	}
	return b.String()
}

// verify reads what the store has: its own word is not enough.
func (p *pull) verify() error {
	for _, b := range p.round.blobs {
		path := filepath.Join(p.daemon.Store, "blobs", b.digest.Algorithm().String(), b.digest.Encoded(), "data")
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("the store does not have %s: %w", b.digest, err)
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		_ = f.Close()
		if err != nil {
			return fmt.Errorf("read %s from the store: %w", b.digest, err)
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != b.digest.Encoded() {
			return fmt.Errorf("the store has bytes of digest %s as %s", got, b.digest)
		}
	}
	return nil
}

// kill ends the daemon without a word.
func (p *pull) kill() {
	if cpu, err := bench.CPUTime(p.daemon.Process.Pid()); err == nil {
		p.cpu = cpu
	}
	p.killed.Store(true)
	_ = p.daemon.Process.Kill9() // fails only when it has ended
}

func (p *pull) stop() error {
	if p.daemon == nil || p.daemon.Process == nil {
		return nil
	}
	return p.daemon.Process.Stop()
}
