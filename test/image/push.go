package image

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Target is a registry to push to.
type Target struct {
	URL                string       // scheme, host and port: https://127.0.0.1:5000
	Client             *http.Client // nil is http.DefaultClient
	Username, Password string       // sent with every request when Username is set
}

// Push uploads the image as REPOSITORY:TAG, blobs that are there excepted, by the monolithic upload of the distribution
// specification (POST, then PUT).
func (i *Image) Push(ctx context.Context, t Target, repository, tag string) error {
	for _, desc := range append([]ocispec.Descriptor{i.Config}, i.Layers...) {
		if err := t.pushBlob(ctx, repository, desc, i.Path(desc.Digest)); err != nil {
			return fmt.Errorf("push %s of %s:%s: %w", desc.Digest, repository, tag, err)
		}
	}
	raw, err := os.ReadFile(i.Path(i.Manifest.Digest))
	if err != nil {
		return fmt.Errorf("push %s:%s: %w", repository, tag, err)
	}
	header := http.Header{"Content-Type": {i.Manifest.MediaType}}
	target := t.URL + "/v2/" + repository + "/manifests/" + tag
	if _, err := t.do(ctx, http.MethodPut, target, header, bytes.NewReader(raw), int64(len(raw)), http.StatusCreated); err != nil {
		return fmt.Errorf("push %s:%s: %w", repository, tag, err)
	}
	return nil
}

func (t Target) pushBlob(ctx context.Context, repository string, desc ocispec.Descriptor, path string) error {
	blobs := t.URL + "/v2/" + repository + "/blobs/"
	if _, err := t.do(ctx, http.MethodHead, blobs+desc.Digest.String(), nil, nil, 0, http.StatusOK); err == nil {
		return nil
	}
	header, err := t.do(ctx, http.MethodPost, blobs+"uploads/", nil, nil, 0, http.StatusAccepted)
	if err != nil {
		return err
	}
	base, err := url.Parse(blobs)
	if err != nil {
		return err
	}
	location, err := base.Parse(header.Get("Location"))
	if err != nil {
		return fmt.Errorf("the registry named the upload %q: %w", header.Get("Location"), err)
	}
	query := location.Query()
	query.Set("digest", desc.Digest.String())
	location.RawQuery = query.Encode()
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = t.do(ctx, http.MethodPut, location.String(), http.Header{"Content-Type": {"application/octet-stream"}}, f, desc.Size, http.StatusCreated)
	return err
}

// do sends one request and returns the response's header, or an error with the registry's own words.
func (t Target) do(ctx context.Context, method, target string, header http.Header, body io.Reader, size int64, want int) (http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.ContentLength = size
	if t.Username != "" {
		req.SetBasicAuth(t.Username, t.Password)
	}
	client := t.Client
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	const words = 4 << 10 // more than any error of a registry
	said, err := io.ReadAll(io.LimitReader(resp.Body, words))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != want {
		return nil, fmt.Errorf("%s %s: the registry answered %s: %s", method, target, resp.Status, bytes.TrimSpace(said))
	}
	return resp.Header, nil
}
