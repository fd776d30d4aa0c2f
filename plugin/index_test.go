package plugin_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/plugin"
	"github.com/docker-quay/docker-quay/snapshotter/index"
	indexes "github.com/docker-quay/docker-quay/snapshotter/index/published"
	"github.com/docker-quay/docker-quay/test/rig"
)

// manifests is what the registry of the image from memory says that its name stands for.
func manifests(ctx context.Context, how string, r plugin.Request) ([]ocispec.Descriptor, error) {
	src, err := open(ctx, how, r)
	if err != nil {
		return nil, err
	}
	return []ocispec.Descriptor{src.Manifest()}, nil
}

// storeIndexes says what would be stored.
func storeIndexes(_ context.Context, r plugin.Request, subject ocispec.Descriptor, layers []indexes.Layer) (digest.Digest, bool, error) {
	for _, l := range layers {
		x, err := index.Decode(bytes.NewReader(l.Text))
		if err != nil {
			return "", false, err
		}
		fmt.Fprintf(os.Stderr, "stored %s: %d entries\n", x.Compression, len(x.Entries))
	}
	if strings.HasSuffix(r.Ref.Name(), "/private") {
		return "", false, fmt.Errorf("%s: %w", r.Ref, origin.ErrDenied)
	}
	return subject.Digest, true, nil
}

// indexed are the results that a run printed as JSON.
type indexed struct {
	Platform, Kind, Note, File                string
	Manifest, Digest, DiffID, Index, Referrer digest.Digest
	Size, IndexSize                           int64
	Entries                                   int
	Pushed                                    bool
}

func results(t *testing.T, r result) []indexed {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	var all []indexed
	for d := json.NewDecoder(strings.NewReader(r.stdout)); ; {
		var one indexed
		switch err := d.Decode(&one); {
		case errors.Is(err, io.EOF):
			return all
		case err != nil:
			t.Fatalf("%v in %s", err, r.stdout)
		}
		all = append(all, one)
	}
}

func TestIndex(t *testing.T) {
	r := run(t, "ok", "docker-quay", "index", "example.test/app")
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	for _, says := range []string{
		"Indexing example.test/app@sha256:", "fetched by this process", "Note: the registry did not answer", "stored gzip: 2 entries", "Published the indexes of 1 layers for linux/",
	} {
		if !strings.Contains(r.stderr, says) {
			t.Errorf("standard error lacks %q:\n%s", says, r.stderr)
		}
	}
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	if len(lines) != 2 || strings.Join(strings.Fields(lines[0]), " ") != "PLATFORM LAYER KIND SIZE INDEX SHARE ENTRIES NOTE" || !strings.Contains(lines[1], " gzip ") {
		t.Errorf("standard output:\n%s", r.stdout)
	}
	noControl(t, r.stdout+r.stderr)

	for _, args := range [][]string{{"--format", "json"}, {"--progress", "json"}, {"--platform", "linux/amd64", "--format", "json"}} {
		all := results(t, run(t, "ok", "docker-quay", append(append([]string{"index"}, args...), "example.test/app")...))
		if len(all) != 1 || all[0].Kind != "gzip" || all[0].Entries != 2 || all[0].Referrer != all[0].Manifest || !all[0].Pushed || all[0].Index == "" || all[0].DiffID == "" {
			t.Errorf("%v: %+v", args, all)
		}
	}
	r = run(t, "ok", "docker-quay", "index", "-q", "example.test/app:1")
	if r.code != 0 || !strings.HasPrefix(r.stdout, "example.test/app@sha256:") || strings.Count(r.stdout, "\n") != 1 {
		t.Errorf("quiet: %+v", r)
	}

	// Into a folder: nothing is stored, and what is there says of which layer it is.
	dir := filepath.Join(t.TempDir(), "new")
	for range 2 {
		r = run(t, "ok", "docker-quay", "index", "-o", dir, "--format", "json", "example.test/app")
	}
	if strings.Contains(r.stderr, "stored") {
		t.Errorf("--output: %s", r.stderr)
	}
	for _, one := range results(t, r) {
		text, err := os.ReadFile(one.File)
		if err != nil {
			t.Fatal(err)
		}
		x, err := index.Decode(bytes.NewReader(text))
		if err != nil || x.Blob != one.Digest || filepath.Base(one.File) != "sha256-"+one.Digest.Encoded()+".index" || one.Referrer != "" || digest.FromBytes(text) != one.Index {
			t.Errorf("%+v: %v", one, err)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("in the folder: %v", left)
	}
}

func TestIndexFailures(t *testing.T) {
	for _, c := range []struct {
		how  string
		args []string
		code int
		says string
	}{
		{"notfound", []string{"index", "example.test/none"}, 3, "cannot read the manifest"},
		{"notfound", []string{"index", "--platform", "linux/arm64", "example.test/none"}, 3, "cannot read the manifest"},
		{"denied", []string{"index", "example.test/app"}, 4, "access denied"},
		{"ok", []string{"index", "example.test/private"}, 4, "access denied"},
		{"mismatch", []string{"index", "example.test/bad"}, 6, "does not match"},
		{"ok", []string{"index"}, 125, "requires 1 argument"},
		{"ok", []string{"index", "UPPER/Case"}, 125, "is not the name of an image"},
		{"ok", []string{"index", "--platform", "a/b/c/d", "x"}, 125, "--platform"},
		{"ok", []string{"index", "--format", "{{.Nonsense}}", "example.test/app"}, 125, "--format"},
		{"ok", []string{"index", "-o", "/dev/null/x", "example.test/app"}, 1, "cannot make the folder"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			r := run(t, c.how, "docker-quay", c.args...)
			if strings.Contains(r.stderr, "stored") {
				t.Errorf("it was found out late: %s", r.stderr)
			}
			if r.code != c.code || !strings.Contains(r.stderr, c.says) || r.stdout != "" {
				t.Errorf("exit code %d, want %d; standard error %q, want one with %q; standard output %q", r.code, c.code, r.stderr, c.says, r.stdout)
			}
		})
	}
}

// shelf is a repository of a real registry that a test fills.
type shelf struct {
	t    *testing.T
	repo *origin.Repository
	name string // with the registry
}

func newShelf(t *testing.T, g *rig.Registry) *shelf {
	t.Helper()
	c, err := origin.New(origin.Options{HostDirs: []string{t.TempDir()}, Credentials: func(string) (string, string, error) {
		user, password := g.Credentials()
		return user, password, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	s := &shelf{t: t, name: g.Ref("team/app")}
	ref, err := reference.ParseNormalizedNamed(s.name)
	if err != nil {
		t.Fatal(err)
	}
	if s.repo, err = c.Repository(ref); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *shelf) push(mediaType string, v any) ocispec.Descriptor {
	s.t.Helper()
	text, ok := v.([]byte)
	if !ok {
		var err error
		if text, err = json.Marshal(v); err != nil {
			s.t.Fatal(err)
		}
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(text), Size: int64(len(text))}
	if err := s.repo.Push(s.t.Context(), d, text); err != nil {
		s.t.Fatal(err)
	}
	return d
}

// packed is a layer and its diff ID.
type packed struct {
	ocispec.Descriptor
	diffID digest.Digest
}

// layer puts a layer with files of these names there, compressed by pack.
func (s *shelf) layer(mediaType string, pack func(io.Writer) io.WriteCloser, names ...string) packed {
	s.t.Helper()
	var text, blob bytes.Buffer
	w := tar.NewWriter(&text)
	for _, name := range names {
		h := &tar.Header{Name: name, Mode: 0o644, Size: 100_000, ModTime: time.Unix(1_700_000_000, 0)}
		if err := w.WriteHeader(h); err != nil {
			s.t.Fatal(err)
		}
		if _, err := w.Write(bytes.Repeat([]byte(name[:1]), 100_000)); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		s.t.Fatal(err)
	}
	z := pack(&blob)
	_, err := z.Write(text.Bytes())
	if err := errors.Join(err, z.Close()); err != nil {
		s.t.Fatal(err)
	}
	return packed{s.push(mediaType, blob.Bytes()), digest.FromBytes(text.Bytes())}
}

// image puts an image of layers there, for linux and an architecture.
func (s *shelf) image(architecture string, layers ...packed) ocispec.Descriptor {
	s.t.Helper()
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: architecture}, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		m.Layers = append(m.Layers, l.Descriptor)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.diffID)
	}
	m.Config = s.push(ocispec.MediaTypeImageConfig, config)
	d := s.push(ocispec.MediaTypeImageManifest, m)
	d.Platform = &config.Platform
	return d
}

func packGzip(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }

func packZstd(w io.Writer) io.WriteCloser {
	z, err := zstd.NewWriter(w)
	if err != nil {
		panic(err) // of options, and there are none
	}
	return z
}

type plain struct{ io.Writer }

func (plain) Close() error               { return nil }
func packTar(w io.Writer) io.WriteCloser { return plain{w} }

// TestIndexInterrupt: what is interrupted publishes nothing and says what to do.
func TestIndexInterrupt(t *testing.T) {
	cmd, out := process(t, "block", "docker-quay", "index", "example.test/app")
	watch := &watcher{until: "fetching\n", seen: make(chan struct{})}
	cmd.Stderr = watch
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-watch.seen
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	r := out(cmd.Wait())
	if said := watch.buf.String(); r.code != 130 || r.stdout != "" || strings.Contains(said, "stored") || !strings.Contains(said, "interrupted: what was fetched is kept") {
		t.Errorf("exit code %d, standard output %q, standard error:\n%s", r.code, r.stdout, said)
	}
}

// TestIndexLogin: who may pull need not be allowed to push, and nobody fetches an image in vain to learn it.
func TestIndexLogin(t *testing.T) {
	g, err := rig.ForTest(t).StartRegistry(t.Context(), rig.RegistryOptions{Username: "u", Password: "p"})
	if errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := newShelf(t, g)
	image := s.name + "@" + s.image("amd64", s.layer(ocispec.MediaTypeImageLayerGzip, packGzip, "a")).Digest.String()
	command := []string{"index", "--no-daemon", "--secret-file", "", "--store", t.TempDir(), "-q", image}
	if r := run(t, "real", "docker-quay", command...); r.code != 4 || r.stdout != "" {
		t.Errorf("without a login: %+v", r)
	}
	config := t.TempDir()
	text := `{"auths":{"` + g.Addr() + `":{"auth":"dTpw"}}}` // u:p
	if err := os.WriteFile(filepath.Join(config, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", config)
	r := run(t, "real", "docker-quay", command...)
	if r.code != 0 || r.stderr != "" || !strings.HasPrefix(r.stdout, s.name+"@sha256:") {
		t.Errorf("with one: %+v", r)
	}
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
	if r := run(t, "real", "docker-quay", command...); r.code != 5 {
		t.Errorf("the registry is away: %+v", r)
	}
}

// TestIndexRegistry: on the real registry, for all platforms of an image, by the real fetcher. Nodes find what was published.
func TestIndexRegistry(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	g, err := rig.ForTest(t).StartRegistry(ctx, rig.RegistryOptions{})
	if errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := newShelf(t, g)
	shared := s.layer(ocispec.MediaTypeImageLayerGzip, packGzip, "a", "b")
	own := s.layer(ocispec.MediaTypeImageLayerGzip, packGzip, "own")
	own.Annotations = map[string]string{"containerd.io/snapshot/stargz/toc.digest": digest.FromString("toc").String()}
	odd := s.layer(ocispec.MediaTypeImageLayer, packTar, strings.Repeat("x", 300)) // longer than any file system has names
	amd := s.image("amd64", shared, s.layer(ocispec.MediaTypeImageLayerZstd, packZstd, "c"), own)
	arm := s.image("arm64", shared, s.layer(ocispec.MediaTypeImageLayer, packTar, "d"), shared)
	said := s.push(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: s.push(ocispec.MediaTypeImageConfig, []byte("{}")), Layers: []ocispec.Descriptor{s.push("application/vnd.in-toto+json", []byte("[]"))},
	})
	attested := said
	attested.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	artifact := said
	artifact.Annotations = map[string]string{"n": "without a word of what it is"}
	list := s.push(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{amd, attested, arm, arm, artifact},
	})
	store := t.TempDir()
	command := func(args ...string) result {
		return run(t, "real", "docker-quay", append([]string{"index", "--no-daemon", "--secret-file", "", "--store", store, "--format", "json"}, args...)...)
	}
	image := s.name + "@" + list.Digest.String()

	r := command(image)
	all := results(t, r)
	type summary struct{ platform, kind, what string }
	var got []summary
	for _, one := range all {
		what := "indexed"
		if one.Index == "" {
			what = one.Note
		}
		got = append(got, summary{one.Platform, one.Kind, what})
		if (one.Index != "") != (one.Referrer != "" && one.Pushed && one.IndexSize > 0 && one.Entries == map[string]int{"gzip": 3, "zstd": 2, "tar": 2}[one.Kind]) {
			t.Errorf("%+v", one)
		}
	}
	want := []summary{
		{"linux/amd64", "gzip", "indexed"}, {"linux/amd64", "zstd", "indexed"}, {"linux/amd64", "eStargz", "it brings a table of contents along"},
		{"linux/arm64", "gzip", "indexed"}, {"linux/arm64", "tar", "indexed"},
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got  %v\nwant %v\n%s", got, want, r.stderr)
	}
	if all[0].Index != all[3].Index || all[0].Referrer == all[3].Referrer {
		t.Errorf("the shared layer: %+v and %+v", all[0], all[3])
	}
	if !strings.Contains(r.stderr, "not a container image") {
		t.Errorf("it says nothing of the artifact:\n%s", r.stderr)
	}

	// Nodes find it, as they ask.
	for _, one := range all {
		if one.Index == "" {
			continue
		}
		x, err := indexes.NewFinder(indexes.FinderOptions{}).Find(ctx, indexes.Query{
			Repository: s.repo, Manifest: one.Manifest, Layer: ocispec.Descriptor{Digest: one.Digest, Size: one.Size}, DiffID: one.DiffID,
			Open: func(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
				return s.repo.Open(ctx, d, 0, -1)
			},
		})
		if err != nil || len(x.Entries) != one.Entries {
			t.Errorf("%s: %v", one.Digest, err)
		}
	}
	// The image is what it was.
	if d, _, err := s.repo.Manifest(ctx, list.Digest.String()); err != nil || d.Digest != list.Digest {
		t.Errorf("%v, %v", d, err)
	}

	t.Run("again", func(t *testing.T) {
		g.ResetStats()
		again := results(t, command(image))
		for i := range again {
			if again[i].Pushed {
				t.Errorf("pushed again: %+v", again[i])
			}
			again[i].Pushed = all[i].Pushed
		}
		if !slices.Equal(again, all) {
			t.Errorf("got  %+v\nwant %+v", again, all)
		}
		// One asks whether pushing is allowed; neither layers nor indexes are asked for.
		if n := g.Stats().Requests[rig.Blobs]; n != 1 {
			t.Errorf("%d requests for blobs", n)
		}
	})
	t.Run("one platform", func(t *testing.T) {
		one := results(t, command("--platform", "linux/arm64", image))
		if len(one) != 2 || one[0].Manifest != arm.Digest || one[0].Pushed || one[0].Referrer != all[3].Referrer {
			t.Errorf("%+v", one)
		}
		if r := command("--platform", "linux/s390x", image); r.code != 3 {
			t.Errorf("none: %+v", r)
		}
	})
	t.Run("all layers", func(t *testing.T) {
		more := results(t, command("--all", s.name+"@"+amd.Digest.String()))
		if len(more) != 3 || more[2].Kind != "eStargz" || more[2].Index == "" || !more[2].Pushed || more[0].Index != all[0].Index {
			t.Errorf("%+v", more)
		}
	})
	t.Run("some cannot be indexed", func(t *testing.T) {
		r := command(s.name + "@" + s.image("amd64", shared, odd).Digest.String())
		some := results(t, r)
		if len(some) != 2 || some[0].Index == "" || some[1].Index != "" || !strings.Contains(some[1].Note, "cannot be indexed") || !strings.Contains(r.stderr, "is left out") {
			t.Errorf("%+v: %s", some, r.stderr)
		}
	})
	t.Run("none can", func(t *testing.T) {
		r := command(s.name + "@" + s.image("amd64", odd).Digest.String())
		if r.code != 1 || !strings.Contains(r.stderr, "no layer of") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("a diff ID that lies", func(t *testing.T) {
		wrong := shared
		wrong.diffID = digest.FromString("wrong")
		r := command(s.name + "@" + s.image("amd64", wrong).Digest.String())
		if r.code != 6 || !strings.Contains(r.stderr, "its configuration says") || r.stdout != "" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("no image", func(t *testing.T) {
		r := command(s.name + "@" + said.Digest.String())
		if r.code != 1 || !strings.Contains(r.stderr, "not a container image") {
			t.Errorf("%+v", r)
		}
	})
}
