package target

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// DockerAPI is what is used of the Docker Engine API; *client.Client has it.
type DockerAPI interface {
	DaemonHost() string
	Info(context.Context, client.InfoOptions) (client.SystemInfoResult, error)
	ImageInspect(context.Context, string, ...client.ImageInspectOption) (client.ImageInspectResult, error)
	ImageList(context.Context, client.ImageListOptions) (client.ImageListResult, error)
	ImageLoad(context.Context, io.Reader, ...client.ImageLoadOption) (client.ImageLoadResult, error)
	ImagePull(context.Context, string, client.ImagePullOptions) (client.ImagePullResponse, error)
	ImageRemove(context.Context, string, client.ImageRemoveOptions) (client.ImageRemoveResult, error)
	ImageTag(context.Context, client.ImageTagOptions) (client.ImageTagResult, error)
}

var _ DockerAPI = (*client.Client)(nil)

// Engine pulls through the Docker Engine API alone: from a mirror on loopback when the engine is on this machine, by
// streaming an archive when it is not, or cannot reach our loopback (it runs in a virtual machine, or rootless).
type Engine struct {
	api        DockerAPI
	containerd bool // the engine has the containerd image store: it takes indexes, and identifies images by them
	load       bool // stream an archive at once
	platform   *ocispec.Platform
	what       string
	say        func(format string, args ...any)
}

func (e *Engine) String() string { return e.what }

// Platform is what the engine tells of its machine.
func (e *Engine) Platform() *ocispec.Platform { return e.platform }

// Close does nothing: the API client belongs to the caller.
func (e *Engine) Close() error { return nil }

// root is what the engine is given: a containerd store keeps the index, so that the image's digest is the one that
// everybody knows; a graph driver drops it.
func (e *Engine) root(img Image) ocispec.Descriptor {
	if e.containerd {
		return img.Target()
	}
	return img.Manifest()
}

// Pull gives the image to the engine and names it.
func (e *Engine) Pull(ctx context.Context, img Image) (Result, error) {
	ref, note := e.tag(img.Ref())
	res := Result{Reference: familiar(ref)}
	if note != "" {
		res.Notes = append(res.Notes, note)
	}
	if e.has(ctx, ref, img) {
		res.UpToDate = true
		return res, nil
	}
	if e.load {
		return res, e.pullByLoad(ctx, img, ref)
	}
	asked, err := e.pullByMirror(ctx, img, ref)
	if err != nil && asked == 0 && ctx.Err() == nil {
		e.say("The Docker Engine cannot reach this machine's loopback (%v): loading the image instead", err)
		err = e.pullByLoad(ctx, img, ref)
	}
	return res, err
}

// tag returns the name the image will have. The Engine API gives no image a digest for a name: it gets a tag made of
// it.
func (e *Engine) tag(ref reference.Named) (reference.Named, string) {
	d, ok := ref.(reference.Digested)
	if !ok {
		return reference.TagNameOnly(ref), ""
	}
	tagged, err := reference.WithTag(reference.TrimNamed(ref), string(d.Digest().Algorithm())+"-"+d.Digest().Encoded())
	if err != nil {
		return ref, ""
	}
	return tagged, fmt.Sprintf("the Docker Engine API cannot name an image by digest: it is tagged %s", familiar(tagged))
}

// has tells whether the engine has the image under its name already.
func (e *Engine) has(ctx context.Context, ref reference.Named, img Image) bool {
	got, err := e.api.ImageInspect(ctx, ref.String())
	if err != nil {
		return false
	}
	if e.containerd {
		// The record may be there with the content of another platform only.
		return got.ID == img.Target().Digest.String() && img.Target().Digest == img.Manifest().Digest
	}
	return got.ID == img.Config().Digest.String()
}

// pullByMirror returns how many requests the engine made, 0 when it could not reach us.
func (e *Engine) pullByMirror(ctx context.Context, img Image, ref reference.Named) (asked int64, err error) {
	m, mctx, err := newMirror(ctx, img)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	temporary := m.reference(e.root(img).Digest)
	opts := client.ImagePullOptions{}
	if p := img.Manifest().Platform; e.containerd && p != nil {
		opts.Platforms = []ocispec.Platform{*p}
	}
	err = e.pull(mctx, temporary, opts)
	if cause := context.Cause(mctx); err != nil && cause != nil {
		err = cause // why a blob could not be read, or the interruption
	}
	if err != nil {
		return m.requests.Load(), fmt.Errorf("put %s into %s: %w", familiar(img.Ref()), e, err)
	}
	// From here on an interruption must not leave the temporary name behind.
	clean := context.WithoutCancel(ctx)
	_, err = e.api.ImageTag(clean, client.ImageTagOptions{Source: temporary, Target: ref.String()})
	if err != nil {
		err = fmt.Errorf("name the image %s in %s: %w", familiar(ref), e, err)
	}
	if _, rerr := e.api.ImageRemove(clean, temporary, client.ImageRemoveOptions{PruneChildren: true}); rerr != nil {
		err = errors.Join(err, fmt.Errorf("remove the temporary name %s from %s: %w", temporary, e, rerr))
	}
	return m.requests.Load(), err
}

func (e *Engine) pull(ctx context.Context, ref string, opts client.ImagePullOptions) error {
	resp, err := e.api.ImagePull(ctx, ref, opts)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	defer resp.Close()
	return lastError(resp)
}

// pullByLoad streams the image as an archive. Nothing is written to disk here; the engine unpacks it all before it
// looks.
func (e *Engine) pullByLoad(ctx context.Context, img Image, ref reference.Named) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		err := writeArchive(ctx, w, img, ref, e.root(img))
		if err != nil && !errors.Is(err, io.ErrClosedPipe) {
			cancel(err) // what the engine says of a cut archive explains nothing
		}
		w.CloseWithError(err)
	}()
	err := e.loadFrom(ctx, r)
	r.CloseWithError(io.ErrClosedPipe)
	<-written
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	if err != nil {
		return fmt.Errorf("load %s into %s: %w", familiar(img.Ref()), e, err)
	}
	return nil
}

func (e *Engine) loadFrom(ctx context.Context, r io.Reader) error {
	resp, err := e.api.ImageLoad(ctx, r, client.ImageLoadWithQuiet(true))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	defer resp.Close()
	return lastError(resp)
}

// lastError reads the engine's stream of JSON messages to its end and returns the error in it.
func lastError(r io.Reader) error {
	dec := json.NewDecoder(r)
	for {
		var msg jsonstream.Message
		switch err := dec.Decode(&msg); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read what the Docker Engine answers: %w", err)
		case msg.Error != nil:
			return fmt.Errorf("%w: %s", ErrRefused, msg.Error.Message)
		}
	}
}
