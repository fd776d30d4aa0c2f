package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/snapshotter/index"
	indexes "github.com/docker-quay/docker-quay/snapshotter/index/published"
)

const (
	// parallelIndexes is how many layers are indexed at once. Decoding is what takes longest and is one core's work; four layers of
	// 138 MB in all took 210 MB of memory at the most.
	parallelIndexes = 4
	// maxConfig bounds an image's configuration, in bytes; registries bound it at 4 MiB.
	maxConfig = 8 << 20
)

// madeIndex is what became of a layer.
type madeIndex struct {
	kind    string
	diffID  digest.Digest
	entries int
	layer   indexes.Layer // its Text is empty when there is none
	note    string        // why not
	refused bool          // because it cannot be
}

// image indexes the image of one platform.
func (ix *indexer) image(ctx context.Context, req Request) (err error) {
	src, err := ix.o.Open(ctx, req)
	if err != nil {
		return err
	}
	defer closing(src, &err)
	config, err := configOf(ctx, src)
	if err != nil {
		return err
	}
	platform := printable(platforms.Format(config.Platform)) // anybody can write what is in it
	ix.reporter.Say("Indexing %s for %s, fetched by %s", src.Ref(), platform, src.Via())
	for _, n := range src.Notes() {
		ix.reporter.Say("Note: %s", n)
	}
	if ix.opts.output == "" && !ix.may {
		// Nobody wants to fetch gigabytes for a push that is refused.
		if _, _, err := ix.o.PublishIndexes(ctx, req, src.Manifest(), nil); err != nil {
			return err
		}
		ix.may = true
	}
	ix.reporter.Start(src.Progress)
	err = src.Fetch(ctx)
	ix.reporter.Stop()
	if err != nil {
		return err
	}
	layers := src.Layers()
	if err := ix.make(ctx, src, layers); err != nil {
		return err
	}
	var results []indexResult
	var found []indexes.Layer
	seen := map[digest.Digest]bool{}
	for i, l := range layers {
		m, diffID := ix.made[l.Digest], config.RootFS.DiffIDs[i]
		if m.diffID != "" && m.diffID != diffID {
			return fmt.Errorf("the layer %s of %s has the diff ID %s, its configuration says %s: %w", l.Digest, src.Ref(), m.diffID, diffID, fetcher.ErrMismatch)
		}
		if seen[l.Digest] {
			continue
		}
		seen[l.Digest] = true
		r := indexResult{
			Platform: platform, Manifest: src.Manifest().Digest, Digest: l.Digest, Size: l.Size, Kind: m.kind, DiffID: diffID, Note: m.note,
		}
		if len(m.layer.Text) > 0 {
			d := m.layer.Descriptor()
			r.Index, r.IndexSize, r.Entries = d.Digest, d.Size, m.entries
			found = append(found, m.layer)
		}
		if m.refused {
			ix.refused++
			ix.reporter.Say("Note: the layer %s is left out: %s", l.Digest, m.note)
		} else {
			ix.useful++
		}
		results = append(results, r)
	}
	if err := ix.keep(ctx, req, src, platform, found, results); err != nil {
		return err
	}
	ix.results = append(ix.results, results...)
	return nil
}

// keep publishes indexes, or writes them, and fills in where they are.
func (ix *indexer) keep(ctx context.Context, req Request, src Source, platform string, found []indexes.Layer, results []indexResult) error {
	switch {
	case len(found) == 0:
		ix.reporter.Say("There is nothing to publish of %s for %s", src.Ref(), platform)
		return nil
	case ix.opts.output != "":
		return ix.write(found, results)
	}
	referrer, pushed, err := ix.o.PublishIndexes(ctx, req, src.Manifest(), found)
	if err != nil {
		return err
	}
	for i := range results {
		if results[i].Index != "" {
			results[i].Referrer, results[i].Pushed = referrer, pushed
		}
	}
	if pushed {
		ix.reporter.Say("Published the indexes of %d layers for %s: %s", len(found), platform, referrer)
	} else {
		ix.reporter.Say("The indexes of %d layers for %s are published already: %s", len(found), platform, referrer)
	}
	return nil
}

// configOf reads the configuration of an image, which must have a diff ID for each layer.
func configOf(ctx context.Context, src Source) (ocispec.Image, error) {
	var config ocispec.Image
	fail := func(err error) (ocispec.Image, error) {
		return config, fmt.Errorf("the configuration of %s: %w", src.Ref(), err)
	}
	desc := src.Config()
	if desc.Size > maxConfig {
		return fail(fmt.Errorf("it has %d MiB: %w", desc.Size>>20, fetcher.ErrUnsupported))
	}
	r, err := src.Open(ctx, desc)
	if err != nil {
		return fail(err)
	}
	text, err := io.ReadAll(io.LimitReader(r, maxConfig+1))
	if err := errors.Join(err, r.Close()); err != nil {
		return fail(err)
	}
	err = json.Unmarshal(text, &config)
	switch n := len(src.Layers()); {
	case err != nil:
		return fail(fmt.Errorf("%w: %w", fetcher.ErrUnsupported, err))
	case n == 0:
		return config, fmt.Errorf("%s has no layers: %w", src.Ref(), fetcher.ErrUnsupported)
	case len(config.RootFS.DiffIDs) != n:
		return fail(fmt.Errorf("it has %d diff IDs for %d layers: %w", len(config.RootFS.DiffIDs), n, fetcher.ErrUnsupported))
	}
	return config, nil
}

// make indexes the layers that were not met before, side by side.
func (ix *indexer) make(ctx context.Context, src Source, layers []ocispec.Descriptor) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelIndexes)
	for _, l := range layers {
		if ix.made[l.Digest] != nil {
			continue
		}
		m := &madeIndex{kind: indexes.OwnTable(l)}
		ix.made[l.Digest] = m
		if m.kind != "" && !ix.opts.all {
			m.note = "it brings a table of contents along"
			continue
		}
		g.Go(func() error { return m.make(ctx, src, l) })
	}
	return g.Wait()
}

// knower is a Source that may know what is in a layer, and what of it is read first: a node on which containers of the
// image have run.
type knower interface {
	// Index is what the node tells others of a layer: a line, and an index unless it has none that it has compared with the layer.
	Index(ctx context.Context, desc ocispec.Descriptor) ([]byte, error)
}

// ask takes the index that the source has, and reports whether there is one.
func (m *madeIndex) ask(ctx context.Context, src Source, l ocispec.Descriptor) bool {
	k, ok := src.(knower)
	if !ok {
		return false
	}
	told, err := k.Index(ctx, l)
	if err != nil {
		return false // it is made here then
	}
	_, text, _ := bytes.Cut(told, []byte{'\n'})
	if len(text) == 0 || len(text) > indexes.MaxIndex {
		return false
	}
	x, err := indexes.Decode(text, l, "")
	if err != nil {
		return false
	}
	m.diffID, m.entries, m.layer = x.DiffID, len(x.Entries), indexes.Layer{Digest: l.Digest, Text: text}
	if m.kind == "" {
		m.kind = string(x.Compression)
	}
	if len(x.First) > 0 {
		m.note = "with what containers on the node read first"
	}
	return true
}

// make indexes a layer.
func (m *madeIndex) make(ctx context.Context, src Source, l ocispec.Descriptor) error {
	if m.ask(ctx, src, l) {
		return nil
	}
	r, err := src.Open(ctx, l)
	if err != nil {
		return err
	}
	x, err := index.Build(ctx, r, l, nil, index.Options{})
	cerr := r.Close()
	var not index.ErrNotIndexable
	switch {
	case errors.As(err, &not):
		m.refused, m.note = true, printable(not.Error())
		return nil
	case err != nil:
		return fmt.Errorf("the layer %s of %s: %w", l.Digest, src.Ref(), err)
	case cerr != nil:
		return cerr
	}
	m.diffID, m.entries = x.DiffID, len(x.Entries)
	if m.kind == "" {
		m.kind = string(x.Compression)
	}
	m.layer, err = indexes.Encode(x)
	if errors.Is(err, indexes.ErrInvalid) {
		m.refused, m.note = true, err.Error()
		return nil
	}
	return err
}

// write writes indexes as files, each at once or not at all, and fills in their names. They have the names that programs which fetch
// artifacts give them.
func (ix *indexer) write(found []indexes.Layer, results []indexResult) error {
	if err := os.MkdirAll(ix.opts.output, 0o755); err != nil {
		return fmt.Errorf("cannot make the folder for the indexes: %w", err)
	}
	for _, l := range found {
		file := filepath.Join(ix.opts.output, l.Name())
		if err := replaceFile(file, l.Text); err != nil {
			return fmt.Errorf("cannot write the index %s: %w", file, err)
		}
		for i := range results {
			if results[i].Digest == l.Digest {
				results[i].File = file
			}
		}
	}
	return nil
}

func replaceFile(file string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".index.*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // nothing is there under this name once it is renamed
	_, err = f.Write(text)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
