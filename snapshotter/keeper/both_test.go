package keeper

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"testing"
)

// TestBoth: two keepers are one store, also when one of them is new, or is none any more.
func TestBoth(t *testing.T) {
	one, other := run(t), run(t)
	dial := func(path string) Store {
		c, err := Dial(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	var told []error
	join := func() Store {
		return NewBoth(dial(one), dial(other), func(err error) { told = append(told, err) })
	}
	suite(t, join(), join)
	told = nil // of the one file more than the second holds, and of the call after its context

	ctx := t.Context()
	first, second, both := dial(one), dial(other), join()
	for _, c := range []struct {
		name   string
		in, to Store
	}{{"a", first, second}, {"b", second, first}} {
		if err := c.in.Put(ctx, c.name, f2(t)); err != nil {
			t.Fatal(err)
		}
		if f, err := both.Get(ctx, c.name); err != nil {
			t.Error(err)
		} else {
			f.Close()
		}
		// Put again, it is in both; that it was there is told when the one that is relied on had it.
		if err := both.Put(ctx, c.name, f2(t)); errors.Is(err, fs.ErrExist) != (c.in == first) {
			t.Errorf("%s again: %v", c.name, err)
		}
		if l, err := c.to.List(ctx); err != nil || !slices.Contains(l, c.name) {
			t.Errorf("%s is not in the other: %v, %v", c.name, l, err)
		}
	}
	if l, err := both.List(ctx); err != nil || !slices.Equal(l, []string{"a", "b"}) {
		t.Errorf("List: %v, %v", l, err)
	}
	for _, name := range []string{"a", "b"} {
		if err := both.Drop(ctx, name); err != nil {
			t.Error(err)
		}
	}
	if err := both.Drop(ctx, "a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Drop twice: %v", err)
	}
	if len(told) > 0 {
		t.Errorf("told: %v", told)
	}

	broken := NewBoth(dial(one), failing{}, func(err error) { told = append(told, err) })
	if err := broken.Put(ctx, "c", f2(t)); err != nil {
		t.Error("the second fails, and so does Put:", err)
	}
	if f, err := broken.Get(ctx, "c"); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
	if l, err := broken.List(ctx); err != nil || !slices.Equal(l, []string{"c"}) {
		t.Errorf("List: %v, %v", l, err)
	}
	if err := broken.Drop(ctx, "c"); err != nil {
		t.Error(err)
	}
	if len(told) != 3 { // Put, List, Drop
		t.Errorf("told: %v", told)
	}
}

// failing is a store that does nothing.
type failing struct{}

var errFails = errors.New("it fails")

func (failing) Put(context.Context, string, *os.File) error   { return errFails }
func (failing) Get(context.Context, string) (*os.File, error) { return nil, errFails }
func (failing) Drop(context.Context, string) error            { return errFails }
func (failing) List(context.Context) ([]string, error)        { return nil, errFails }
func (failing) Close() error                                  { return nil }
