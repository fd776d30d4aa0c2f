package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/gossip"
)

// SegmentSize is the unit in which the registry is asked, in bytes. Four MiB
// takes 170 ms at 200 Mbit/s: long enough that the request itself does not
// count, short enough that a share can be handed on without losing much.
const SegmentSize = 4 << 20

const (
	// maxMessage bounds every message read from another member, in bytes. The
	// largest honest one is the answer to an announcement: 32 neighbours with two
	// bitmaps each of a blob of 1 TiB.
	maxMessage = 8 << 20
	// maxBlobSize bounds the blob sizes a member may speak of, in bytes.
	maxBlobSize = 1 << 40
	// maxNodeID bounds a node ID in bytes; ours are 32 hexadecimal digits.
	maxNodeID = 64
	// maxZone bounds the name of a zone in bytes.
	maxZone = 64
	// maxDoubts bounds how many nodes one announcement can cast doubt on.
	maxDoubts = 8
	// maxHolds bounds the blobs in one message about complete blobs.
	maxHolds = 1024
)

// ErrMessage is wrapped by every refusal of a malformed message.
var ErrMessage = errors.New("malformed message from a cluster member")

// Segments returns how many segments a blob of size bytes has; 0 for an empty
// blob.
func Segments(size int64) int {
	return int((size + SegmentSize - 1) / SegmentSize)
}

// Bitmap is a set of small numbers, such as segments, one bit each, lowest bit
// first.
type Bitmap []byte

// NewBitmap returns an empty set over n numbers.
func NewBitmap(n int) Bitmap { return make(Bitmap, (n+7)/8) }

// Has reports whether i is in the set; out of range is never in it.
func (b Bitmap) Has(i int) bool {
	return i >= 0 && i>>3 < len(b) && b[i>>3]&(1<<(i&7)) != 0
}

// Set adds i, which must be in range.
func (b Bitmap) Set(i int) { b[i>>3] |= 1 << (i & 7) }

// Count returns how many numbers are in the set.
func (b Bitmap) Count() (n int) {
	for _, v := range b {
		n += bits.OnesCount8(v)
	}
	return n
}

// Member is a node of the trust domain.
type Member = gossip.Node

func validMember(m Member) error {
	ip := m.Addr.Addr()
	many := ip.IsMulticast() || ip.IsUnspecified() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255})
	if many || len(m.ID) == 0 || len(m.ID) > maxNodeID || len(m.Zone) > maxZone || !m.Addr.IsValid() || m.Addr.Port() == 0 {
		return fmt.Errorf("%w: member %.40q at %v", ErrMessage, m.ID, m.Addr)
	}
	return nil
}

func compareIDs(a, b string) int { return strings.Compare(a, b) }

// Announcement is what a node says of its part in one blob.
type Announcement struct {
	Digest digest.Digest `json:"digest"`
	// Size is the blob's size in bytes.
	Size int64 `json:"size"`
	// Have is how many bytes the node holds.
	Have int64 `json:"have"`
	// Registry tells that the node can ask the registry for this blob: only such a
	// node is lent segments.
	Registry bool `json:"registry,omitempty"`
	// Active tells that the node is fetching the blob now. A node that holds
	// part of a blob but does not fetch it serves what it has and is lent nothing.
	Active bool `json:"active,omitempty"`
	// Leech tells that the node gives nothing: it is named to nobody.
	Leech bool `json:"leech,omitempty"`
	// Held is the set of segments the node holds entirely, Claimed of those it
	// fetches from the registry, or has been lent and will.
	Held    Bitmap `json:"held,omitempty"`
	Claimed Bitmap `json:"claimed,omitempty"`
	// Want is how many more segments it would take from the registry now.
	Want int `json:"want,omitempty"`
	// Hungry tells that peers deliver, but so slowly that the registry should be
	// asked as well.
	Hungry bool `json:"hungry,omitempty"`
	// Doubt names nodes that did not deliver what they claim to hold.
	Doubt []string `json:"doubt,omitempty"`
	// Absent tells that the node has no part in the blob any more.
	Absent bool `json:"absent,omitempty"`
}

// Complete reports whether the node holds the whole blob.
func (a *Announcement) Complete() bool { return !a.Absent && a.Have == a.Size }

func (a *Announcement) validate() error {
	if err := a.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: %v", ErrMessage, err)
	}
	if a.Size < 0 || a.Size > maxBlobSize || a.Have < 0 || a.Have > a.Size {
		return fmt.Errorf("%w: %d of %d bytes of %s", ErrMessage, a.Have, a.Size, a.Digest)
	}
	n := Segments(a.Size)
	if limit := len(NewBitmap(n)); len(a.Held) > limit || len(a.Claimed) > limit {
		return fmt.Errorf("%w: more segments than %s has", ErrMessage, a.Digest)
	}
	if len(a.Doubt) > maxDoubts {
		return fmt.Errorf("%w: doubts about %d nodes", ErrMessage, len(a.Doubt))
	}
	for _, id := range a.Doubt {
		if len(id) > maxNodeID {
			return fmt.Errorf("%w: node ID of %d bytes", ErrMessage, len(id))
		}
	}
	a.Want = min(max(a.Want, 0), grantAlone)
	if a.Absent {
		a.Held, a.Claimed, a.Have, a.Active, a.Want = nil, nil, 0, false, 0
	}
	return nil
}

// Said is one node's part in a blob.
type Said struct {
	Member
	Announcement
}

// Reply is what a keeper answers to an announcement.
type Reply struct {
	Digest digest.Digest `json:"digest"`
	// Peers are nodes that fetch or hold the blob: all of them when they are few,
	// else some that stay the same.
	Peers []Said `json:"peers,omitempty"`
	// Owners are the nodes among which Rank names, for each segment, the one that
	// reads through to the registry for others.
	Owners []Member `json:"owners,omitempty"`
	// Granted are segments that the asker is to get from the registry; with Anyway
	// set, also those pieces of them that peers have.
	Granted []int `json:"granted,omitempty"`
	Anyway  bool  `json:"anyway,omitempty"`
	// Nodes counts those at the blob, Complete those of them that hold all of it,
	// Lent the segments that were lent so far.
	Nodes    int `json:"nodes,omitempty"`
	Complete int `json:"complete,omitempty"`
	Lent     int `json:"lent,omitempty"`
	// Next is when the next announcement is due at the latest, in nanoseconds.
	Next time.Duration `json:"next,omitempty"`
	// Absent confirms that the asker is off the list.
	Absent bool `json:"absent,omitempty"`
	// Elsewhere names the blob's keeper when the one that was asked knows better.
	Elsewhere *Member `json:"elsewhere,omitempty"`
}

// MarshalJSON leaves out what is the same for all peers, a third of the message: a
// keeper may have to send thousands of them within seconds.
func (a Reply) MarshalJSON() ([]byte, error) {
	type plain Reply
	brief := plain(a)
	brief.Peers = slices.Clone(a.Peers)
	for i := range brief.Peers {
		brief.Peers[i].Digest, brief.Peers[i].Size = "", 0
	}
	return json.Marshal(brief)
}

func (a *Reply) validate(d digest.Digest, size int64) error {
	if a.Digest != d {
		return fmt.Errorf("%w: an answer about another blob", ErrMessage)
	}
	if len(a.Peers) > 2*maxNeighbours || len(a.Owners) > 2*maxOwners || len(a.Granted) > 2*grantAlone {
		return fmt.Errorf("%w: %d peers, %d owners, %d segments", ErrMessage, len(a.Peers), len(a.Owners), len(a.Granted))
	}
	for i := range a.Peers {
		s := &a.Peers[i]
		if s.Digest == "" && s.Size == 0 {
			s.Digest, s.Size = d, size // see MarshalJSON
		}
		if err := validMember(s.Member); err != nil {
			return err
		}
		if err := s.Announcement.validate(); err != nil {
			return err
		}
		if s.Digest != d || s.Size != size {
			return fmt.Errorf("%w: a peer of another blob", ErrMessage)
		}
	}
	for i := range a.Owners {
		if err := validMember(a.Owners[i]); err != nil {
			return err
		}
	}
	if a.Elsewhere != nil {
		if err := validMember(*a.Elsewhere); err != nil {
			return err
		}
	}
	n := Segments(size)
	for _, s := range a.Granted {
		if s < 0 || s >= n {
			return fmt.Errorf("%w: segment %d of %d", ErrMessage, s, n)
		}
	}
	a.Next = min(max(a.Next, announceEvery), HoldEvery)
	return nil
}

// Hold is a complete blob of a member.
type Hold struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

// envelope is what every message begins with: where the sender can be reached.
type envelope struct {
	Port      uint16         `json:"port,omitempty"`
	Addr      netip.AddrPort `json:"addr,omitzero"`
	Zone      string         `json:"zone,omitempty"`
	Ephemeral bool           `json:"ephemeral,omitempty"`
	Reach     bool           `json:"reach,omitempty"`
	// Insist asks for an answer even of a keeper that knows a better one: that one
	// did not answer.
	Insist bool `json:"insist,omitempty"`
}

type announce struct {
	envelope
	Announcement Announcement `json:"announcement"`
}

type holds struct {
	envelope
	Holds []Hold `json:"holds"`
}

func (h *holds) validate() error {
	if len(h.Holds) > maxHolds {
		return fmt.Errorf("%w: %d blobs", ErrMessage, len(h.Holds))
	}
	for _, b := range h.Holds {
		if err := b.Digest.Validate(); err != nil || b.Size < 0 || b.Size > maxBlobSize {
			return fmt.Errorf("%w: blob %.80q of %d bytes", ErrMessage, b.Digest, b.Size)
		}
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
