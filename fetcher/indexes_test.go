package fetcher

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

// TestIndexFromMember: a node that knows what is in a blob tells a member that has
// nothing of it yet; who asks decides whether that is of use, and asks the next one
// when it is not.
func TestIndexFromMember(t *testing.T) {
	r := newRegistry(t)
	data := random(3 << 20)
	desc := r.add(data)
	s := secret()
	says := map[string][]byte{}
	var holders []*testNode
	var at []string
	for i, what := range []string{"", "a lie", "the truth"} {
		n := newNode(t, t.TempDir(), s, at...)
		right(t, n.blob(t, desc, r.origin(t)), data, 20*time.Second)
		says[n.NodeID()] = []byte(what)
		n.OfferIndexes(func(_ context.Context, d digest.Digest) ([]byte, error) {
			if d != desc.Digest || i == 0 {
				return nil, cluster.ErrNotHeld
			}
			return []byte(what), nil
		})
		holders, at = append(holders, n), append(at, n.Addr().String())
	}
	asker := newNode(t, t.TempDir(), s, at...)
	acquainted(t, 3, append(holders, asker)...)
	known(t, desc.Digest, 3, append(holders, asker)...)
	before := r.served.Load()
	b := asker.blob(t, desc, r.origin(t))
	var heard []string
	err := b.Index(within(t, 10*time.Second), func(x []byte) error {
		if heard = append(heard, string(x)); string(x) != "the truth" {
			return errors.New("that is not so")
		}
		return nil
	})
	if err != nil || len(heard) == 0 || heard[len(heard)-1] != "the truth" {
		t.Fatalf("heard %q: %v", heard, err)
	}
	if p := b.Progress(); p.Have != 0 || r.served.Load() != before {
		t.Errorf("%d bytes are here, the registry gave %d", p.Have, r.served.Load()-before)
	}

	// Nobody who tells the truth.
	holders[2].OfferIndexes(nil)
	if err := b.Index(within(t, 10*time.Second), func(x []byte) error { return fmt.Errorf("no: %s", x) }); err == nil || err.Error() != "no: a lie" {
		t.Errorf("only a lie: %v", err)
	}
	holders[1].OfferIndexes(nil)
	if err := b.Index(within(t, 10*time.Second), func([]byte) error { return nil }); !errors.Is(err, ErrNoIndex) {
		t.Errorf("nobody says anything: %v", err)
	}
}

// TestIndexIsBounded: neither what a member says nor how long it takes is unlimited.
func TestIndexIsBounded(t *testing.T) {
	r := newRegistry(t)
	data := random(1 << 20)
	desc := r.add(data)
	s := secret()
	holder := newNode(t, t.TempDir(), s)
	right(t, holder.blob(t, desc, r.origin(t)), data, 20*time.Second)
	asker := newNode(t, t.TempDir(), s, holder.Addr().String())
	acquainted(t, 1, holder, asker)
	known(t, desc.Digest, 1, holder, asker)
	b := asker.blob(t, desc, r.origin(t))
	taken := func([]byte) error { return nil }
	for _, size := range []int{cluster.MaxIndex, cluster.MaxIndex + 1} {
		holder.OfferIndexes(func(context.Context, digest.Digest) ([]byte, error) { return bytes.Repeat([]byte{1}, size), nil })
		got := 0
		err := b.Index(within(t, 20*time.Second), func(x []byte) error { got = len(x); return nil })
		if fits := size <= cluster.MaxIndex; fits != (err == nil) || fits && got != size {
			t.Errorf("%d bytes: got %d, %v", size, got, err)
		}
	}
	holder.OfferIndexes(func(ctx context.Context, _ digest.Digest) ([]byte, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	begun := time.Now()
	if err := b.Index(within(t, time.Second), taken); err == nil {
		t.Error("an index of a member that says nothing")
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("waited %s", took)
	}
}
