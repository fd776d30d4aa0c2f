package gossip

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

const (
	// MaxMessage is the size of a broadcast message in bytes: with its signature it fits one packet beside other news.
	MaxMessage = 512

	castVersion  = 1
	castOverhead = 1 + 16 + 8 + trust.SignatureSize
	labelCast    = "gossip v1: broadcast"

	// castRate and castBurst bound what one node broadcasts, and what is taken from one, in messages a second: news of the
	// whole cluster, not a data path. Every member sends each on a few times.
	castRate  = 10
	castBurst = 40
	// castRateAll and castBurstAll bound what is taken from all together; checking a signature is 50 µs, so this is 2.5 % of
	// a core at worst.
	castRateAll  = 500
	castBurstAll = 1000
	// castDirect is to how many members a node sends its own message at once, before gossip does the rest.
	castDirect = 32
	// castRepeat is memberlist's factor for how often each node sends a message on: 4 · ⌈log10(members+1)⌉ times.
	castRepeat = 4
	// castQueue bounds the messages that wait to be sent; the ones sent most often go first. castInbox bounds those that wait
	// for OnMessage.
	castQueue = 512
	castInbox = 256
)

// ErrTooFast is the error of Broadcast for a node that sends more than it may.
var ErrTooFast = errors.New("too many broadcasts in a short time")

// casts sends and takes broadcast messages. One on the wire:
//
//	version 1 · origin 16 · number 8 · message · signature 64
//
// The number rises with each message of an origin. A message is passed on when it is new and its origin is a member.
type casts struct {
	g     *Gossip
	queue *memberlist.TransmitLimitedQueue
	inbox chan cast
	out   *rate.Limiter
	all   *rate.Limiter

	mu      sync.Mutex // guards following
	number  uint64
	origins map[string]*castOrigin
}

type cast struct {
	from string
	text []byte
}

// castOrigin is what was taken from one node. It stays after the node left, so that nothing is taken twice.
type castOrigin struct {
	window window
	limit  *rate.Limiter
}

func newCasts(g *Gossip) *casts {
	return &casts{
		g: g,
		queue: &memberlist.TransmitLimitedQueue{
			NumNodes:       func() int { return g.members.count() + 1 },
			RetransmitMult: castRepeat,
		},
		inbox:   make(chan cast, castInbox),
		out:     rate.NewLimiter(castRate, castBurst),
		all:     rate.NewLimiter(castRateAll, castBurstAll),
		origins: map[string]*castOrigin{},
	}
}

// Broadcast sends a message of at most MaxMessage bytes to all members: best effort, in no order, once each. It does not wait.
// The error is ErrTooFast above ten messages a second.
func (g *Gossip) Broadcast(b []byte) error {
	if len(b) == 0 || len(b) > MaxMessage {
		return fmt.Errorf("gossip: a message of %d bytes; 1 to %d can be broadcast", len(b), MaxMessage)
	}
	c := g.casts
	if !c.out.Allow() {
		return ErrTooFast
	}
	c.mu.Lock()
	c.number++
	m := make([]byte, 0, castOverhead+len(b))
	m = append(m, castVersion)
	m = append(m, g.transport.self[:]...)
	m = binary.BigEndian.AppendUint64(m, c.number)
	c.mu.Unlock()
	m = append(m, b...)
	m = append(m, g.self.id.Sign(labelCast, m)...)
	members := g.Members()
	first := rand.IntN(max(len(members), 1))
	for i := range min(len(members), castDirect) {
		to := members[(first+i)%len(members)].ID
		if id, err := parseID(to); err == nil {
			// An error is a packet lost, which gossip makes up for.
			_ = g.list.SendBestEffort(&memberlist.Node{Name: to, Addr: id.overlay(), Port: overlayPort}, m)
		}
	}
	c.send(m)
	return nil
}

func (c *casts) send(m []byte) {
	c.queue.QueueBroadcast(queued(m))
	c.queue.Prune(castQueue)
}

// queued is a message as memberlist queues it.
type queued []byte

var _ memberlist.UniqueBroadcast = queued(nil)

func (q queued) Invalidates(memberlist.Broadcast) bool { return false }
func (q queued) Message() []byte                       { return q }
func (q queued) Finished()                             {}
func (q queued) UniqueBroadcast()                      {}

// parseCast splits a message; sig covers text, and body is the part of it that the origin sent.
func parseCast(m []byte) (from nodeID, number uint64, text, body, sig []byte, ok bool) {
	if len(m) <= castOverhead || len(m) > castOverhead+MaxMessage || m[0] != castVersion {
		return from, 0, nil, nil, nil, false
	}
	cut := len(m) - trust.SignatureSize
	from = nodeID(m[1:17])
	number = binary.BigEndian.Uint64(m[17:25])
	return from, number, m[:cut], m[25:cut], m[cut:], true
}

// receive takes a message from the network, m being memberlist's.
func (c *casts) receive(m []byte) {
	id, number, text, body, sig, ok := parseCast(m)
	if !ok || id == c.g.transport.self {
		return
	}
	from := id.String()
	_, key, ok := c.g.members.get(from)
	if !ok || !c.fresh(from, number) {
		return
	}
	// Copies of a message are dropped above and count for nothing; forgeries count for all, but not for whom they name.
	if !c.all.Allow() || !trust.Verify(from, key, labelCast, text, sig) || !c.take(from, number) {
		return
	}
	c.send(append([]byte(nil), m...))
	if c.g.o.OnMessage == nil {
		return
	}
	select {
	case c.inbox <- cast{from, append([]byte(nil), body...)}:
	default:
	}
}

func (c *casts) fresh(from string, number uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.origins[from]
	return o == nil && number > 0 || o != nil && o.window.fresh(number)
}

// take marks a message as seen and reports whether it was not, and its origin keeps to its rate.
func (c *casts) take(from string, number uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.origins[from]
	if o == nil {
		if len(c.origins) >= maxSenders {
			for old := range c.origins {
				delete(c.origins, old)
				break
			}
		}
		// Twice what a node sends by itself: messages bunch up on the way.
		o = &castOrigin{limit: rate.NewLimiter(2*castRate, 2*castBurst)}
		c.origins[from] = o
	}
	if !o.window.fresh(number) {
		return false
	}
	o.window.mark(number)
	return o.limit.AllowN(time.Now(), 1)
}

// deliver calls OnMessage until ctx ends.
func (c *casts) deliver(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case m := <-c.inbox:
			c.g.o.OnMessage(m.from, m.text)
		}
	}
}
