package keeper

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
)

// Both is a Store that has every file twice, so that either of two may be lost: in a keeper and with systemd. The first is
// relied on. The second does what it can: it may be a service manager that keeps nothing for this unit, and what it fails
// in is told and is no error.
type Both struct {
	first, second Store
	tell          func(error)
}

var _ Store = (*Both)(nil)

// NewBoth joins two stores, which it owns from now on. tell hears of what the second fails in.
func NewBoth(first, second Store, tell func(error)) *Both { return &Both{first, second, tell} }

// Put implements Store. A file that the first has and the second lacks is put there.
func (b *Both) Put(ctx context.Context, name string, f *os.File) error {
	err := b.first.Put(ctx, name, f)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := b.second.Put(ctx, name, f); err != nil && !errors.Is(err, fs.ErrExist) {
		b.tell(err)
	}
	return err
}

// Get implements Store.
func (b *Both) Get(ctx context.Context, name string) (*os.File, error) {
	f, err := b.first.Get(ctx, name)
	if err == nil {
		return f, nil
	}
	if f, serr := b.second.Get(ctx, name); serr == nil {
		return f, nil
	} else if !errors.Is(serr, fs.ErrNotExist) {
		b.tell(serr)
	}
	return nil, err
}

// Drop implements Store.
func (b *Both) Drop(ctx context.Context, name string) error {
	err := b.first.Drop(ctx, name)
	switch serr := b.second.Drop(ctx, name); {
	case serr == nil && errors.Is(err, fs.ErrNotExist):
		return nil // it was there
	case serr != nil && !errors.Is(serr, fs.ErrNotExist):
		b.tell(serr)
	}
	return err
}

// List implements Store.
func (b *Both) List(ctx context.Context) ([]string, error) {
	names, err := b.first.List(ctx)
	if err != nil {
		return nil, err
	}
	more, err := b.second.List(ctx)
	if err != nil {
		b.tell(err)
	}
	names = append(names, more...)
	slices.Sort(names)
	return slices.Compact(names), nil
}

// Close implements Store.
func (b *Both) Close() error { return errors.Join(b.first.Close(), b.second.Close()) }
