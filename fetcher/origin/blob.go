package origin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Open asks for n bytes of a blob from off on; n < 0 means up to its end. It returns once the registry has begun to answer.
// desc must have digest and size. ctx bounds the whole stream, not only the opening. The stream must be closed.
//
// No request is made for an empty range.
func (r *Repository) Open(ctx context.Context, desc ocispec.Descriptor, off, n int64) (*Stream, error) {
	k := call{op: "read the blob", path: "blobs/" + string(desc.Digest), blob: desc.Digest, reference: r.name.String() + "@" + string(desc.Digest)}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
	}
	if n < 0 {
		n = desc.Size - off
	}
	if off < 0 || n < 0 || off > desc.Size || n > desc.Size-off {
		return nil, fmt.Errorf("cannot %s %s: bytes %d+%d do not lie within its %d", k.op, k.reference, off, n, desc.Size)
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &Stream{repository: r, ctx: ctx, cancel: cancel, call: k, size: desc.Size, off: off, pos: off, end: off + n}
	if n == 0 {
		return s, nil
	}
	p, err := r.openPart(ctx, k, off, s.end, s.size)
	if err != nil {
		cancel()
		return nil, err
	}
	if p.whole && n != desc.Size {
		s.whole, s.off, s.pos, s.end = true, 0, 0, desc.Size
	}
	s.part = p
	return s, nil
}

// Stat asks how large a blob is, for callers that were given its digest alone; the media type is the neutral one. It asks for
// the first byte instead of sending HEAD, since signed URLs are good for one method: a stream that follows finds the URL resolved.
func (r *Repository) Stat(ctx context.Context, d digest.Digest) (ocispec.Descriptor, error) {
	k := call{op: "find the size of the blob", path: "blobs/" + string(d), blob: d, reference: r.name.String() + "@" + string(d)}
	desc := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: d}
	if err := d.Validate(); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
	}
	if d == d.Algorithm().FromBytes(nil) {
		return desc, nil // it has no first byte to ask for
	}
	k.header = http.Header{"Range": {"bytes=0-0"}}
	err := r.each(ctx, docker.HostCapabilityPull, k, func(ep *endpoint, k call) error {
		a, err := r.send(ctx, ep, k)
		if err != nil {
			return err
		}
		defer a.Body.Close()
		desc.Size = a.ContentLength
		if a.StatusCode == http.StatusPartialContent {
			if _, _, desc.Size, err = parseContentRange(a.Header.Get("Content-Range")); err != nil {
				return r.failed(ep, k, a.host, ticket{}, failure{kind: ErrMismatch, cause: err, status: a.StatusCode})
			}
			discard(a.Response)
		}
		if desc.Size < 0 {
			return r.failed(ep, k, a.host, ticket{}, failure{kind: ErrUnexpected, cause: errors.New("it does not tell the size"), status: a.StatusCode})
		}
		return nil
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return desc, nil
}

// part is one response with bytes of a blob.
type part struct {
	*answer
	ep    *endpoint
	first int64 // the offset of the body's first byte
	end   int64 // behind its last
	whole bool  // 200
}

// openPart asks for the bytes from off to end of a blob of size bytes, and checks that what is announced fits: the part
// begins at off, or is the whole blob.
func (r *Repository) openPart(ctx context.Context, k call, off, end, size int64) (*part, error) {
	if off > 0 || end < size {
		k.header = http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", off, end-1)}}
	}
	var p *part
	err := r.each(ctx, docker.HostCapabilityPull, k, func(ep *endpoint, k call) error {
		a, err := r.send(ctx, ep, k)
		if err != nil {
			return err
		}
		if p, err = partOf(a.Response, off, end, size); err != nil {
			a.Body.Close()
			return r.failed(ep, k, a.host, ticket{}, failure{kind: ErrMismatch, cause: err, status: a.StatusCode})
		}
		p.answer, p.ep = a, ep
		return nil
	})
	return p, err
}

// partOf reads from the headers of a response what its body is.
func partOf(resp *http.Response, off, end, size int64) (*part, error) {
	if e := resp.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return nil, fmt.Errorf("it came encoded as %q", oneLine(e, maxCode))
	}
	p := &part{end: size, whole: true}
	if resp.StatusCode == http.StatusPartialContent {
		first, last, total, err := parseContentRange(resp.Header.Get("Content-Range"))
		switch {
		case err != nil:
			return nil, err
		case total >= 0 && total != size:
			return nil, fmt.Errorf("it has %d bytes there, the manifest says %d", total, size)
		case first != off || last >= end:
			return nil, fmt.Errorf("bytes %d-%d came for %d-%d", first, last, off, end-1)
		}
		*p = part{first: first, end: last + 1} // less than asked is allowed (RFC 9110 §15.3.7): the rest is asked for later
	}
	if n := resp.ContentLength; n >= 0 && n != p.end-p.first {
		if p.whole {
			return nil, fmt.Errorf("it has %d bytes there, the manifest says %d", n, size)
		}
		return nil, fmt.Errorf("%d bytes were announced for a range of %d", n, p.end-p.first)
	}
	return p, nil
}

var contentRange = regexp.MustCompile(`^bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)$`)

// parseContentRange reads a Content-Range header (RFC 9110 §14.4) of a satisfied range. total is -1 when the sender does not
// know it. 18 digits are below 2^63.
func parseContentRange(value string) (first, last, total int64, err error) {
	m := contentRange.FindStringSubmatch(value)
	if m == nil {
		return 0, 0, 0, fmt.Errorf("the Content-Range %q is none of one range", oneLine(value, maxCode))
	}
	first, _ = strconv.ParseInt(m[1], 10, 64)
	last, _ = strconv.ParseInt(m[2], 10, 64)
	total = -1
	if m[3] != "*" {
		total, _ = strconv.ParseInt(m[3], 10, 64)
	}
	if last < first || total >= 0 && last >= total {
		return 0, 0, 0, fmt.Errorf("the Content-Range %q contradicts itself", oneLine(value, maxCode))
	}
	return first, last, total, nil
}
