package published

import (
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/store"
)

// MakeOptions say of what layer and for whom. Layer and Open are needed.
type MakeOptions struct {
	// Layer must have digest and size.
	Layer ocispec.Descriptor
	// Open reads the layer from its start.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// PieceLength in bytes is a power of two from 16 KiB to 64 MiB; 0 is the store's for such a layer, or above that so much that the
	// file stays below its bound.
	PieceLength int64
	// Name of the file; "" is the digest with a "-" for its colon. Another name gives another infohash, and so another swarm.
	Name string
	// WebSeeds are URLs where anybody gets the layer.
	WebSeeds []string
	// Trackers are announce URLs, each a tier of its own: they are asked in this order.
	Trackers []string
	// Private keeps clients to the trackers.
	Private bool
	// CreatedBy names the program that made it; "" says nothing.
	CreatedBy string
}

// maxHashes bounds the piece hashes of made metainfo in bytes: half of what Parse takes, and as much as any tracker's site accepts. It is
// reached at 400 GiB of 1 MiB pieces.
const maxHashes = 8 << 20

// leastPiece is the piece length of a small layer, as clients choose it. The store's may be shorter, for reads of parts of a layer that
// strangers are not asked for.
const leastPiece = 256 << 10

// Make reads the layer once and makes its metainfo. ErrMismatch says that the layer is not what its digest says.
func Make(ctx context.Context, o MakeOptions) (*Torrent, error) {
	if err := o.Check(); err != nil {
		return nil, fmt.Errorf("cannot make a torrent of the layer %s: %w", o.Layer.Digest, err)
	}
	pieces, err := o.hash(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot make a torrent of the layer %s: %w", o.Layer.Digest, err)
	}
	info := metainfo.Info{Name: o.Name, Length: o.Layer.Size, PieceLength: o.PieceLength, Pieces: pieces}
	if o.Private {
		info.Private = &o.Private
	}
	t := &Torrent{
		Layer: ocispec.Descriptor{Digest: o.Layer.Digest, Size: o.Layer.Size},
		Info:  info, WebSeeds: o.WebSeeds, Private: o.Private,
	}
	for _, u := range o.Trackers {
		t.Trackers = append(t.Trackers, []string{u})
	}
	t.MetaInfo = outer(bencode.MustMarshal(info), t.Trackers, t.WebSeeds, o.Layer.Digest.String(), o.CreatedBy)
	t.InfoHash = t.MetaInfo.HashInfoBytes()
	return t, nil
}

// Check fills in what is not said, and refuses what Parse would not take. Make does it too; this tells before a layer is there.
func (o *MakeOptions) Check() error {
	if err := o.Layer.Digest.Validate(); err != nil {
		return err
	}
	if o.Layer.Size <= 0 || o.Layer.Size > maxLayer {
		return fmt.Errorf("a torrent cannot be of %d bytes", o.Layer.Size)
	}
	if o.PieceLength == 0 {
		o.PieceLength = max(store.PieceSize(o.Layer.Size), leastPiece)
		for numPieces(o.Layer.Size, o.PieceLength)*sha1.Size > maxHashes {
			o.PieceLength *= 2
		}
	}
	if o.Name == "" {
		o.Name = LayerName(o.Layer.Digest)
	}
	if o.PieceLength < minPiece || o.PieceLength > maxPiece || o.PieceLength&(o.PieceLength-1) != 0 {
		return fmt.Errorf("a piece length of %d is not a power of two from %d KiB to %d MiB", o.PieceLength, minPiece>>10, maxPiece>>20)
	}
	if numPieces(o.Layer.Size, o.PieceLength)*sha1.Size > maxHashes {
		return fmt.Errorf("pieces of %d bytes would be too many: %d", o.PieceLength, numPieces(o.Layer.Size, o.PieceLength))
	}
	if len(o.Trackers) > maxURLs || len(o.WebSeeds) > maxURLs {
		return fmt.Errorf("more than %d trackers or web seeds", maxURLs)
	}
	for _, u := range o.Trackers {
		if err := checkURL(u, trackerSchemes); err != nil {
			return fmt.Errorf("tracker: %w", err)
		}
	}
	for _, u := range o.WebSeeds {
		if err := checkURL(u, webSeedSchemes); err != nil {
			return fmt.Errorf("web seed: %w", err)
		}
	}
	return nil
}

// hash reads the layer and returns the SHA-1 of its pieces, one behind the other, once its digest was found right.
func (o *MakeOptions) hash(ctx context.Context) ([]byte, error) {
	rc, err := o.Open(ctx)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	verifier := o.Layer.Digest.Verifier()
	r := io.TeeReader(rc, verifier)
	pieces := make([]byte, 0, numPieces(o.Layer.Size, o.PieceLength)*sha1.Size)
	piece := sha1.New()
	for left := o.Layer.Size; left > 0; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		piece.Reset()
		n := min(o.PieceLength, left)
		switch got, err := io.CopyN(piece, r, n); {
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("%w: %d bytes instead of %d", ErrMismatch, o.Layer.Size-left+got, o.Layer.Size)
		case err != nil:
			return nil, err
		}
		pieces = piece.Sum(pieces)
		left -= n
	}
	// The end is waited for: a reader that checks the digest itself tells only there.
	switch n, err := io.CopyN(io.Discard, r, 1); {
	case n > 0:
		return nil, fmt.Errorf("%w: more than %d bytes", ErrMismatch, o.Layer.Size)
	case !errors.Is(err, io.EOF):
		return nil, err
	case !verifier.Verified():
		return nil, fmt.Errorf("%w: its bytes have another", ErrMismatch)
	}
	return pieces, nil
}
