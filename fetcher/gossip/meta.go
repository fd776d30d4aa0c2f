package gossip

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

const (
	// MaxZone is the length of a zone in bytes: room for "provider/region/zone".
	MaxZone = 63

	// metaVersion is the first byte of what a member says of itself. Another one is another protocol.
	metaVersion = 1
	// labelMeta is what the signature below it is for.
	labelMeta = "gossip v1: node"

	flagEphemeral = 1 << 0
	flagOrigin    = 1 << 1
)

// Node is a member: who it is, where it is reached, and what it said of itself.
type Node struct {
	// ID is its node ID, 32 hexadecimal digits: see trust.Identity.
	ID string
	// Addr is its TLS port.
	Addr netip.AddrPort
	// Zone is where it stands, "" when it does not say. At most MaxZone letters, digits and ._-/: signs.
	Zone string
	// Ephemeral is set for a process that comes and goes and to which nothing should be entrusted.
	Ephemeral bool
	// Origin is set for a node that can reach registries.
	Origin bool
}

// nodeID is a node ID as it is sent.
type nodeID [16]byte

// parseID reads the one spelling of a node ID.
func parseID(s string) (id nodeID, err error) {
	if len(s) != 2*len(id) {
		return id, fmt.Errorf("node ID %.40q does not have 32 digits", s)
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil || hex.EncodeToString(id[:]) != s {
		return id, fmt.Errorf("node ID %q is not lower-case hexadecimal", s)
	}
	return id, nil
}

func (id nodeID) String() string { return hex.EncodeToString(id[:]) }

// overlay is the address that memberlist knows a node by: made from its ID, in the range for private use (RFC 4193), never
// dialled. The prefix replaces one byte of the ID; the name tells the rest.
func (id nodeID) overlay() net.IP {
	ip := make(net.IP, 16)
	copy(ip, id[:])
	ip[0] = 0xfd
	return ip
}

// overlayPort is the port of every overlay address: memberlist takes 0 for "unknown".
const overlayPort = 1

// meta is what a member says of itself.
type meta struct {
	node Node   // ID unset until verified
	seq  uint64 // rises with every change of the same node
	key  []byte // its public key
	sig  []byte
	text []byte // what sig covers, but for the label
}

// encodeMeta signs what n says of itself:
//
//	version 1 · flags 1 · seq 8 · address length 1 · address 0, 4 or 16 · port 2 · zone length 1 · zone · key 32 · signature 64
//
// at most 189 bytes; memberlist takes 512. The address has no length before the node knows it; such a meta is never sent.
func encodeMeta(id *trust.Identity, n Node, seq uint64) []byte {
	var flags byte
	if n.Ephemeral {
		flags |= flagEphemeral
	}
	if n.Origin {
		flags |= flagOrigin
	}
	b := []byte{metaVersion, flags}
	b = binary.BigEndian.AppendUint64(b, seq)
	addr := n.Addr.Addr().AsSlice()
	b = append(b, byte(len(addr)))
	b = append(b, addr...)
	b = binary.BigEndian.AppendUint16(b, n.Addr.Port())
	b = append(b, byte(len(n.Zone)))
	b = append(b, n.Zone...)
	b = append(b, id.PublicKey()...)
	return append(b, id.Sign(labelMeta, b)...)
}

var errMeta = errors.New("malformed description of a member")

// parseMeta reads what encodeMeta wrote and nothing else. It does not verify.
func parseMeta(b []byte) (m meta, err error) {
	bad := func(what string) (meta, error) { return meta{}, fmt.Errorf("%w: %s", errMeta, what) }
	all := b
	take := func(n int) []byte {
		if len(b) < n {
			b = nil
			return nil
		}
		var head []byte
		head, b = b[:n], b[n:]
		return head
	}
	head := take(11)
	if head == nil || head[0] != metaVersion || head[1]&^(flagEphemeral|flagOrigin) != 0 {
		return bad("version or flags")
	}
	m.node.Ephemeral = head[1]&flagEphemeral != 0
	m.node.Origin = head[1]&flagOrigin != 0
	m.seq = binary.BigEndian.Uint64(head[2:])
	ip, ok := netip.AddrFromSlice(take(int(head[10])))
	if !ok {
		return bad("address")
	}
	port := take(3)
	if port == nil {
		return bad("port")
	}
	m.node.Addr = netip.AddrPortFrom(ip, binary.BigEndian.Uint16(port))
	zone := take(int(port[2]))
	m.node.Zone = string(zone)
	if len(zone) != int(port[2]) || CheckZone(m.node.Zone) != nil {
		return bad("zone")
	}
	m.key = take(trust.PublicKeySize)
	m.text = all[:len(all)-len(b)]
	m.sig = take(trust.SignatureSize)
	if m.sig == nil || len(b) != 0 {
		return bad("length")
	}
	return m, nil
}

// verifyMeta reads what the node called name said of itself.
func verifyMeta(name string, b []byte) (meta, error) {
	m, err := parseMeta(b)
	if err != nil {
		return m, err
	}
	if !trust.Verify(name, m.key, labelMeta, m.text, m.sig) {
		return meta{}, fmt.Errorf("%w: it is not signed by the node it describes", errMeta)
	}
	m.node.ID = name
	return m, nil
}

// CheckZone says what is wrong with a zone.
func CheckZone(z string) error {
	if len(z) > MaxZone {
		return fmt.Errorf("zone %.20q… is longer than %d bytes", z, MaxZone)
	}
	for _, c := range []byte(z) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '.', c == '_', c == '-', c == '/', c == ':':
		default:
			return fmt.Errorf("zone %q: only letters, digits and ._-/: may be in it", z)
		}
	}
	return nil
}

// checkAddr says why a node cannot be reached at an address that it advertises. self is this node's own, invalid when not
// known yet: a loopback address is another machine to everybody but those on loopback, too.
func checkAddr(a netip.AddrPort, self netip.Addr) error {
	ip := a.Addr()
	switch {
	case !ip.IsValid(), ip.IsUnspecified():
		return fmt.Errorf("%w: no address", errMeta)
	case a.Port() == 0:
		return fmt.Errorf("%w: no port", errMeta)
	case ip.IsMulticast(), ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("%w: %s is the address of many", errMeta, ip)
	case ip.Is4In6(), ip.Zone() != "", ip.Is6() && ip.IsLinkLocalUnicast():
		return fmt.Errorf("%w: %s means nothing to other machines", errMeta, ip)
	case ip.IsLoopback() && self.IsValid() && !self.IsLoopback():
		return fmt.Errorf("%w: %s is a loopback address and this node's is not", errMeta, ip)
	}
	return nil
}
