package gossip

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/hashicorp/memberlist"
)

// maxMembers bounds the list. A member costs about 2 KiB; memberlist is known to serve ten thousand.
const maxMembers = 20_000

// errRefused is why an entry is not taken into the list.
var errRefused = errors.New("refused as a member")

// members is the list as memberlist reports it. memberlist calls Notify… one at a time, with its own lock held: nothing here
// calls it back.
type members struct {
	self string
	log  *slog.Logger
	// own tells this node's address; joined and lost are told of members that came, and of those that left or did not
	// answer any more.
	own    func() netip.Addr
	joined func()
	lost   func(Node)

	mu      sync.Mutex // guards following
	live    map[string]*member
	byAddr  map[netip.AddrPort]int // how many of live are there
	sorted  []Node                 // of live; nil when it must be made again
	changed chan struct{}

	// vetted is the entry that NotifyAlive took last: what memberlist reports next, if it reports at all.
	vetted struct {
		name string
		raw  []byte
		meta meta
	}
}

type member struct {
	meta
	raw []byte
}

var (
	_ memberlist.AliveDelegate = (*members)(nil)
	_ memberlist.EventDelegate = (*members)(nil)
)

func newMembers(self string, log *slog.Logger) *members {
	return &members{
		self: self, log: log,
		live: map[string]*member{}, byAddr: map[netip.AddrPort]int{}, changed: make(chan struct{}),
	}
}

// NotifyAlive says whether an entry may be believed.
func (m *members) NotifyAlive(n *memberlist.Node) error {
	if n.Name == m.self {
		return nil // memberlist objects by itself to what is wrong about this node
	}
	id, err := parseID(n.Name)
	if err != nil {
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	if n.Port != overlayPort || !n.Addr.Equal(id.overlay()) {
		return fmt.Errorf("%w: %s has a foreign address", errRefused, n.Name)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.live[n.Name]
	switch {
	case have != nil && bytes.Equal(have.raw, n.Meta):
		return nil
	case have == nil && len(m.live) >= maxMembers:
		return fmt.Errorf("%w: %d members are enough", errRefused, maxMembers)
	case m.vetted.name == n.Name && bytes.Equal(m.vetted.raw, n.Meta):
		// Verified a moment ago; the address is judged again.
	default:
		got, err := verifyMeta(n.Name, n.Meta)
		if err != nil {
			return fmt.Errorf("%w: %w", errRefused, err)
		}
		m.vetted.name, m.vetted.raw, m.vetted.meta = n.Name, bytes.Clone(n.Meta), got
	}
	got := m.vetted.meta
	if err := checkAddr(got.node.Addr, m.own()); err != nil {
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	if have != nil && got.seq <= have.seq {
		return fmt.Errorf("%w: %s has said something newer", errRefused, n.Name)
	}
	return nil
}

// NotifyJoin adds a member.
func (m *members) NotifyJoin(n *memberlist.Node) { m.put(n) }

// NotifyUpdate changes what a member says of itself.
func (m *members) NotifyUpdate(n *memberlist.Node) { m.put(n) }

func (m *members) put(n *memberlist.Node) {
	if n.Name == m.self {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.live[n.Name]
	if have != nil && bytes.Equal(have.raw, n.Meta) {
		return
	}
	got := m.vetted.meta
	if m.vetted.name != n.Name || !bytes.Equal(m.vetted.raw, n.Meta) {
		var err error
		if got, err = verifyMeta(n.Name, n.Meta); err != nil {
			return // memberlist has asked NotifyAlive
		}
	}
	if have == nil {
		m.log.Info("peer joined", "node", n.Name, "addr", got.node.Addr)
	} else {
		m.unmapLocked(have.node.Addr)
		if have.node.Addr != got.node.Addr {
			m.log.Info("peer moved", "node", n.Name, "from", have.node.Addr, "to", got.node.Addr)
		}
	}
	m.live[n.Name] = &member{meta: got, raw: bytes.Clone(n.Meta)}
	m.byAddr[got.node.Addr]++
	m.touchLocked()
	if have == nil {
		m.joined()
	}
}

// NotifyLeave removes a member that left or does not answer.
func (m *members) NotifyLeave(n *memberlist.Node) {
	m.mu.Lock()
	have := m.live[n.Name]
	if have != nil {
		delete(m.live, n.Name)
		m.unmapLocked(have.node.Addr)
		m.touchLocked()
	}
	m.mu.Unlock()
	if have != nil {
		m.log.Info("peer gone", "node", n.Name, "addr", have.node.Addr)
		m.lost(have.node)
	}
}

func (m *members) unmapLocked(a netip.AddrPort) {
	if m.byAddr[a]--; m.byAddr[a] <= 0 {
		delete(m.byAddr, a)
	}
}

func (m *members) touchLocked() {
	m.sorted = nil
	close(m.changed)
	m.changed = make(chan struct{})
}

// list is the live members in the order of their IDs. It must not be changed.
func (m *members) list() []Node {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.sorted == nil {
		m.sorted = make([]Node, 0, len(m.live))
		for _, l := range m.live {
			m.sorted = append(m.sorted, l.node)
		}
		slices.SortFunc(m.sorted, func(a, b Node) int { return strings.Compare(a.ID, b.ID) })
	}
	return m.sorted
}

func (m *members) change() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

func (m *members) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.live)
}

// get is a live member and the key it signs with.
func (m *members) get(name string) (n Node, key []byte, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.live[name]
	if l == nil {
		return Node{}, nil, false
	}
	return l.node, l.key, true
}

// at reports whether a live member advertises an address.
func (m *members) at(a netip.AddrPort) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.byAddr[a] > 0
}

func (m *members) route(name string) (netip.AddrPort, bool) {
	n, _, ok := m.get(name)
	return n.Addr, ok
}
