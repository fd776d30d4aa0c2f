package gossip

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"
)

// A packet on the wire:
//
//	version 1 · sender 16 · counter 8 · AES-256-GCM(key of the sender, nonce = counter, message) · tag 16
//
// The header and the receiver's ID are authenticated with it. The key of a sender is HMAC-SHA256(gossip key, label and
// sender): node IDs are made afresh by every process, so no nonce is ever used twice, and nobody has to count together.
const (
	packetVersion = 1
	headerSize    = 1 + 16 + 8
	sealOverhead  = headerSize + 16
	labelSender   = "docker-quay gossip v1: sender"

	// maxSenders bounds for how many nodes the last counters are kept, a kilobyte each: all members and as many that were.
	maxSenders = 2 * maxMembers

	// strangerRate and strangerBurst bound how many packets a second of senders not heard of before are tried: a key must be
	// derived for each, 2 µs. A thousand nodes that join in one second pass; a flood costs under half a percent of a core.
	strangerRate  = 2000
	strangerBurst = 4000
)

// senderKey makes the cipher of one sender's packets.
func senderKey(key []byte, id nodeID) cipher.AEAD {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(labelSender))
	h.Write(id[:])
	block, err := aes.NewCipher(h.Sum(nil))
	if err != nil {
		panic(err) // only for a key of another length
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

func nonce(counter uint64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 4, 12), counter)
}

// sealer seals this node's packets.
type sealer struct {
	self    nodeID
	aead    cipher.AEAD
	counter atomic.Uint64
}

func newSealer(key []byte, self nodeID) *sealer {
	return &sealer{self: self, aead: senderKey(key, self)}
}

func (s *sealer) seal(to nodeID, msg []byte) []byte {
	n := s.counter.Add(1)
	b := make([]byte, 0, sealOverhead+len(msg))
	b = append(b, packetVersion)
	b = append(b, s.self[:]...)
	b = binary.BigEndian.AppendUint64(b, n)
	return s.aead.Seal(b, nonce(n), msg, append(b[:headerSize:headerSize], to[:]...))
}

// opener opens packets sealed for this node.
type opener struct {
	key       []byte
	self      nodeID
	strangers *rate.Limiter

	mu      sync.Mutex // guards following
	senders map[nodeID]*sender
}

type sender struct {
	aead   cipher.AEAD
	window window
	addr   netip.AddrPort // where the last packet came from
}

func newOpener(key []byte, self nodeID) *opener {
	return &opener{key: key, self: self, strangers: rate.NewLimiter(strangerRate, strangerBurst), senders: map[nodeID]*sender{}}
}

// open returns the message in b, unless it was not sealed by a member for this node, or was seen before.
func (o *opener) open(b []byte, from netip.AddrPort) (msg []byte, ok bool) {
	if len(b) < sealOverhead || b[0] != packetVersion {
		return nil, false
	}
	id := nodeID(b[1:17])
	counter := binary.BigEndian.Uint64(b[17:])
	if id == o.self {
		return nil, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.senders[id]
	known := s != nil
	if !known {
		if !o.strangers.Allow() {
			return nil, false
		}
		s = &sender{aead: senderKey(o.key, id)}
	}
	if !s.window.fresh(counter) {
		return nil, false
	}
	msg, err := s.aead.Open(nil, nonce(counter), b[headerSize:], append(b[:headerSize:headerSize], o.self[:]...))
	if err != nil {
		return nil, false
	}
	if !known {
		if len(o.senders) >= maxSenders {
			for old := range o.senders { // in no order that a sender could choose
				delete(o.senders, old)
				break
			}
		}
		o.senders[id] = s
	}
	s.window.mark(counter)
	s.addr = from
	return msg, true
}

// last is the address that the node's last packet came from.
func (o *opener) last(id nodeID) (netip.AddrPort, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if s := o.senders[id]; s != nil {
		return s.addr, true
	}
	return netip.AddrPort{}, false
}

// window remembers which of a rising sequence of numbers were seen: the highest, and which of the 63 below it. What is older
// counts as seen. (RFC 4303 §3.4.3 does the same for IPsec.)
type window struct {
	top  uint64
	seen uint64 // bit i: top-i
}

// fresh reports whether n was not seen. Zero never is.
func (w *window) fresh(n uint64) bool {
	switch {
	case n == 0:
		return false
	case n > w.top:
		return true
	case w.top-n >= 64:
		return false
	}
	return w.seen&(1<<(w.top-n)) == 0
}

// mark makes n seen.
func (w *window) mark(n uint64) {
	if n > w.top {
		if n-w.top < 64 {
			w.seen <<= n - w.top
		} else {
			w.seen = 0
		}
		w.top = n
	}
	if w.top-n < 64 {
		w.seen |= 1 << (w.top - n)
	}
}
