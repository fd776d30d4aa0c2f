package rig_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// patience bounds a whole test, starts of daemons included.
const patience = 2 * time.Minute

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// need fails the test, or skips it when what is missing is a program that `make deps` installs.
func need(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func push(ctx context.Context, t *testing.T, g *rig.Registry, i *image.Image, repository, tag string) {
	t.Helper()
	username, password := g.Credentials()
	client := g.Client()
	defer client.CloseIdleConnections()
	target := image.Target{URL: g.URL(), Client: client, Username: username, Password: password}
	if err := i.Push(ctx, target, repository, tag); err != nil {
		t.Fatal(err)
	}
}

// answer is what a request for a blob came to.
type answer struct {
	status int
	header http.Header
	body   []byte
	err    error // of reading the body
}

func get(ctx context.Context, t *testing.T, client *http.Client, url string, header http.Header) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest) // the registry offers an OCI manifest only to who asks for it
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, body, err}
}

// TestRegistry walks through what a registry serves and counts, with and without TLS and passwords, and over a stop.
func TestRegistry(t *testing.T) {
	for _, c := range []struct {
		name    string
		options rig.RegistryOptions
	}{
		{"plain", rig.RegistryOptions{}},
		{"tls", rig.RegistryOptions{TLS: true}},
		{"tls and password", rig.RegistryOptions{TLS: true, Username: "alice", Password: "secret"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := testContext(t)
			r := rig.ForTest(t)
			g, err := r.StartRegistry(ctx, c.options)
			need(t, err)
			const size = 1 << 20
			i, err := image.Random(ctx, t.TempDir(), size, 1)
			if err != nil {
				t.Fatal(err)
			}
			push(ctx, t, g, i, "test/random", "1")
			g.ResetStats()

			client := g.Client()
			defer client.CloseIdleConnections()
			blob := g.URL() + "/v2/test/random/blobs/" + i.Layers[0].Digest.String()
			header := http.Header{}
			if c.options.Username != "" {
				if a := get(ctx, t, client, blob, nil); a.status != http.StatusUnauthorized {
					t.Errorf("without a password the registry answers %d", a.status)
				}
				request := http.Request{Header: header}
				request.SetBasicAuth(c.options.Username, c.options.Password)
			}
			a := get(ctx, t, client, blob, header)
			if got := fmt.Sprintf("sha256:%x", sha256.Sum256(a.body)); a.err != nil || got != i.Layers[0].Digest.String() {
				t.Errorf("the blob came as %s, %d, %v", got, a.status, a.err)
			}
			header.Set("Range", "bytes=100-199")
			if part := get(ctx, t, client, blob, header); part.status != http.StatusPartialContent || string(part.body) != string(a.body[100:200]) {
				t.Errorf("a range was answered with %d and %d bytes", part.status, len(part.body))
			}
			header.Del("Range")
			if m := get(ctx, t, client, g.URL()+"/v2/test/random/manifests/1", header); m.status != http.StatusOK {
				t.Errorf("the manifest was answered with %d: %s", m.status, m.body)
			}
			stats := g.Stats()
			if stats.Manifests != i.Manifest.Size || stats.Blobs != size+100 || stats.BlobsTo["127.0.0.1"] != stats.Blobs {
				t.Errorf("counted %+v", stats)
			}

			if err := g.Stop(); err != nil {
				t.Fatal(err)
			}
			if a := get(ctx, t, client, blob, header); a.err == nil {
				t.Errorf("stopped, it answers %d", a.status)
			}
			if err := g.Start(ctx); err != nil {
				t.Fatal(err)
			}
			if a := get(ctx, t, client, blob, header); a.err != nil || len(a.body) != size {
				t.Errorf("started again it answers %d, %d bytes, %v", a.status, len(a.body), a.err)
			}
			if after := g.Stats(); after.Blobs != stats.Blobs+size {
				t.Errorf("the counters did not go on: %d, then %d", stats.Blobs, after.Blobs)
			}
		})
	}
}

// TestFaults turns on one fault after the other and looks at what a client sees.
func TestFaults(t *testing.T) {
	ctx := testContext(t)
	r := rig.ForTest(t)
	g, err := r.StartRegistry(ctx, rig.RegistryOptions{})
	need(t, err)
	const size = 1 << 20
	i, err := image.Random(ctx, t.TempDir(), size, 1)
	if err != nil {
		t.Fatal(err)
	}
	push(ctx, t, g, i, "random", "1")
	client := g.Client()
	defer client.CloseIdleConnections()
	digest := i.Layers[0].Digest.String()
	blob := g.URL() + "/v2/random/blobs/" + digest
	whole := get(ctx, t, client, blob, nil).body
	tail := http.Header{"Range": {fmt.Sprintf("bytes=%d-", size/2)}}

	g.SetFaults(rig.Faults{CutAfter: 1000})
	if a := get(ctx, t, client, blob, nil); a.err == nil || len(a.body) != 1000 {
		t.Errorf("cut: %d bytes, %v", len(a.body), a.err)
	}
	g.SetFaults(rig.Faults{WholeOnly: true})
	if a := get(ctx, t, client, blob, tail); a.status != http.StatusOK || len(a.body) != size {
		t.Errorf("whole only: %d, %d bytes", a.status, len(a.body))
	}
	g.SetFaults(rig.Faults{Unavailable: 2, RetryAfter: 1500 * time.Millisecond})
	for n := range 3 {
		a := get(ctx, t, client, blob, nil)
		if refused := n < 2; refused != (a.status == http.StatusServiceUnavailable) || refused != (a.header.Get("Retry-After") == "2") {
			t.Errorf("unavailable, request %d: %d, Retry-After %q", n, a.status, a.header.Get("Retry-After"))
		}
	}
	g.SetFaults(rig.Faults{RateLimited: 1})
	if a := get(ctx, t, client, blob, nil); a.status != http.StatusTooManyRequests {
		t.Errorf("rate limited: %d", a.status)
	}
	g.SetFaults(rig.Faults{Deny: rig.DenyBlobs})
	if a := get(ctx, t, client, blob, nil); a.status != http.StatusForbidden || !strings.Contains(string(a.body), "DENIED") {
		t.Errorf("denied: %d %s", a.status, a.body)
	}
	if a := get(ctx, t, client, g.URL()+"/v2/random/manifests/1", nil); a.status != http.StatusOK {
		t.Errorf("denied blobs: the manifest is answered with %d", a.status)
	}
	g.SetFaults(rig.Faults{CorruptAt: size/2 + 10, CorruptLen: 5})
	if a := get(ctx, t, client, blob, tail); len(a.body) != size/2 || a.body[9] != whole[size/2+9] || a.body[10] == whole[size/2+10] ||
		a.body[14] == whole[size/2+14] || a.body[15] != whole[size/2+15] {
		t.Errorf("corrupt: %d bytes, and not those five differ", len(a.body))
	}
	g.SetFaults(rig.Faults{Delay: 100 * time.Millisecond})
	begin := time.Now()
	if a := get(ctx, t, client, blob, nil); a.status != http.StatusOK || time.Since(begin) < 100*time.Millisecond {
		t.Errorf("delayed: %d after %s", a.status, time.Since(begin))
	}
	g.SetFaults(rig.Faults{Hang: true})
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if a := get(short, t, client, blob, nil); !errors.Is(a.err, context.DeadlineExceeded) {
		t.Errorf("hanging: %d, %v", a.status, a.err)
	}
	g.SetFaults(rig.Faults{})
	if a := get(ctx, t, client, blob, tail); a.status != http.StatusPartialContent || len(a.body) != size/2 {
		t.Errorf("without faults: %d, %d bytes", a.status, len(a.body))
	}
}

// TestSignedRedirect: a signed URL serves without credentials until it expires; only who may read gets one.
func TestSignedRedirect(t *testing.T) {
	ctx := testContext(t)
	r := rig.ForTest(t)
	g, err := r.StartRegistry(ctx, rig.RegistryOptions{Username: "alice", Password: "secret"})
	need(t, err)
	i, err := image.Random(ctx, t.TempDir(), 1<<20, 1)
	if err != nil {
		t.Fatal(err)
	}
	push(ctx, t, g, i, "random", "1")
	client := g.Client()
	defer client.CloseIdleConnections()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	blob := g.URL() + "/v2/random/blobs/" + i.Layers[0].Digest.String()

	const ttl = 300 * time.Millisecond
	g.SetFaults(rig.Faults{RedirectTTL: ttl})
	if a := get(ctx, t, client, blob, nil); a.status != http.StatusUnauthorized || a.header.Get("WWW-Authenticate") == "" {
		t.Errorf("without a password: %d, challenge %q", a.status, a.header.Get("WWW-Authenticate"))
	}
	header := http.Header{}
	request := http.Request{Header: header}
	request.SetBasicAuth("alice", "secret")
	a := get(ctx, t, client, blob, header)
	location := a.header.Get("Location")
	if a.status != http.StatusFound || location == "" {
		t.Fatalf("with the password: %d, Location %q", a.status, location)
	}
	if a := get(ctx, t, client, location, http.Header{"Range": {"bytes=0-9"}}); a.status != http.StatusPartialContent || len(a.body) != 10 {
		t.Errorf("the signed URL: %d, %d bytes", a.status, len(a.body))
	}
	if a := get(ctx, t, client, strings.Replace(location, "signature=", "signature=0", 1), nil); a.status != http.StatusForbidden {
		t.Errorf("a forged signature: %d", a.status)
	}
	time.Sleep(ttl) // the clock itself is tested
	if a := get(ctx, t, client, location, nil); a.status != http.StatusForbidden {
		t.Errorf("the expired URL: %d", a.status)
	}
	if stats := g.Stats(); stats.Blobs < 10 {
		t.Errorf("bytes of signed URLs are not counted: %+v", stats)
	}
}
