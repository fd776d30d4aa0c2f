package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net/netip"

	"github.com/opencontainers/go-digest"
)

// SegmentSize is the unit in which the registry is asked, in bytes. Four MiB
// takes 170 ms at 200 Mbit/s: long enough that the request itself does not
// count, short enough that a share can be handed on without losing much.
const SegmentSize = 4 << 20

const (
	// maxMessage bounds every message read from another member, in bytes. The
	// largest honest one is the claims of a 16 TiB blob (512 KiB of bits, in
	// base64) with its envelope.
	maxMessage = 1 << 20
	// maxBlobSize bounds the blob sizes a member may speak of, in bytes.
	maxBlobSize = 16 << 40
	// maxMembers bounds the members a node keeps and passes on. Beyond it new
	// ones are ignored: a member cannot fill another's memory with addresses.
	maxMembers = 256
	// maxNodeID bounds a node ID in bytes; ours are 32 hexadecimal digits.
	maxNodeID = 64
)

// ErrMessage is wrapped by every refusal of a malformed message.
var ErrMessage = errors.New("malformed message from a cluster member")

// Segments returns how many segments a blob of size bytes has; 0 for an empty
// blob.
func Segments(size int64) int {
	return int((size + SegmentSize - 1) / SegmentSize)
}

// Bitmap is a set of segment numbers, one bit each, lowest bit first.
type Bitmap []byte

// NewBitmap returns an empty set over n segments.
func NewBitmap(n int) Bitmap { return make(Bitmap, (n+7)/8) }

// Has reports whether segment i is in the set; out of range is never in it.
func (b Bitmap) Has(i int) bool {
	return i >= 0 && i>>3 < len(b) && b[i>>3]&(1<<(i&7)) != 0
}

// Set adds segment i, which must be in range.
func (b Bitmap) Set(i int) { b[i>>3] |= 1 << (i & 7) }

// Count returns how many segments are in the set.
func (b Bitmap) Count() (n int) {
	for _, v := range b {
		n += bits.OnesCount8(v)
	}
	return n
}

// Member is another node of the trust domain.
type Member struct {
	// ID is the node ID, proven by its TLS certificate.
	ID string `json:"id"`
	// Addr is where its TLS port can be reached.
	Addr netip.AddrPort `json:"addr"`
}

// hello is both the question and the answer of the membership exchange.
type hello struct {
	// Port is the TLS port of the sender; its address is the one the
	// connection comes from unless Addr names another.
	Port uint16         `json:"port,omitempty"`
	Addr netip.AddrPort `json:"addr,omitzero"`
	// ID and Members are set in answers only.
	ID      string   `json:"id,omitempty"`
	Members []Member `json:"members,omitempty"`
}

// Announcement is what a node says of its part in one blob.
type Announcement struct {
	Digest digest.Digest `json:"digest"`
	// Size is the blob's size in bytes.
	Size int64 `json:"size"`
	// Have is how many bytes the node holds.
	Have int64 `json:"have"`
	// Origin tells that the node can ask the registry: only such a node is
	// given a share.
	Origin bool `json:"origin,omitempty"`
	// Active tells that the node is fetching the blob now. A node that holds
	// part of a blob but does not fetch it serves what it has and owns nothing.
	Active bool `json:"active,omitempty"`
	// Held is the set of segments the node holds entirely, Claimed of those it
	// is fetching from the registry at this moment.
	Held    Bitmap `json:"held,omitempty"`
	Claimed Bitmap `json:"claimed,omitempty"`
	// Absent tells that the node has no part in the blob.
	Absent bool `json:"absent,omitempty"`
}

// Complete reports whether the node holds the whole blob.
func (a *Announcement) Complete() bool { return !a.Absent && a.Have == a.Size }

func (a *Announcement) validate() error {
	if err := a.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: %v", ErrMessage, err)
	}
	if a.Absent {
		a.Held, a.Claimed, a.Have, a.Active = nil, nil, 0, false
		return nil
	}
	if a.Size < 0 || a.Size > maxBlobSize || a.Have < 0 || a.Have > a.Size {
		return fmt.Errorf("%w: %d of %d bytes of %s", ErrMessage, a.Have, a.Size, a.Digest)
	}
	limit := len(NewBitmap(Segments(a.Size)))
	if len(a.Held) > limit || len(a.Claimed) > limit {
		return fmt.Errorf("%w: more segments than %s has", ErrMessage, a.Digest)
	}
	return nil
}

// decode reads one bounded JSON message.
func decode(r io.Reader, into any) error {
	b, err := io.ReadAll(io.LimitReader(r, maxMessage+1))
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("%w: longer than %d bytes", ErrMessage, maxMessage)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%w: %v", ErrMessage, err)
	}
	return nil
}

func (h *hello) validate() error {
	if len(h.ID) > maxNodeID {
		return fmt.Errorf("%w: node ID of %d bytes", ErrMessage, len(h.ID))
	}
	if len(h.Members) > maxMembers {
		return fmt.Errorf("%w: %d members", ErrMessage, len(h.Members))
	}
	for _, m := range h.Members {
		if len(m.ID) > maxNodeID || !m.Addr.IsValid() {
			return fmt.Errorf("%w: member without an address", ErrMessage)
		}
	}
	return nil
}
