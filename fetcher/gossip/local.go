package gossip

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/time/rate"
)

// Local discovery is BEP 14: its group, its port and its message, in which the infohash is a tag that only holders of the
// secret can make. A stranger on the network sees that there is a cluster, and where; one that repeats what it saw makes
// members dial an address of its choice, a few times a minute, and hears nothing but the beginning of a TLS handshake.
const (
	localGroup = "239.192.152.143:6771"
	labelLocal = "docker-quay gossip v1: local discovery"
	tagSize    = 20 // an infohash

	// localFirst is the first pause between announcements while nobody was found; it doubles up to localAlone. localEvery is
	// the pause afterwards, as BEP 14 wants it.
	localFirst = time.Second
	localAlone = time.Minute
	localEvery = 5 * time.Minute
	// localRate and localBurst bound how many announcements of this cluster are heeded, in one second.
	localRate  = 10
	localBurst = 64
	// maxAnnouncement bounds a message: BEP 14 wants it to fit one packet. maxHeaders bounds its lines.
	maxAnnouncement = 1400
	maxHeaders      = 32
)

// multicast is a socket in the group, on every network of the machine.
type multicast interface {
	// Send sends b on every interface that is up; ReadFrom returns what others, and this socket, sent.
	Send(b []byte) error
	ReadFrom(b []byte) (int, netip.Addr, error)
	Close() error
}

// localTag is what members recognise each other's announcements by.
func localTag(key []byte) [tagSize]byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(labelLocal))
	return [tagSize]byte(h.Sum(nil))
}

// announcement is a message of BEP 14.
type announcement struct {
	port   uint16
	tags   [][tagSize]byte
	cookie string
}

func (a announcement) encode() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "BT-SEARCH * HTTP/1.1\r\nHost: %s\r\nPort: %d\r\n", localGroup, a.port)
	for _, t := range a.tags {
		fmt.Fprintf(&b, "Infohash: %x\r\n", t)
	}
	if a.cookie != "" {
		fmt.Fprintf(&b, "cookie: %s\r\n", a.cookie)
	}
	b.WriteString("\r\n\r\n")
	return b.Bytes()
}

var errAnnouncement = errors.New("malformed BEP 14 message")

// parseAnnouncement reads a message as BEP 14 has it, of any client.
func parseAnnouncement(b []byte) (a announcement, err error) {
	if len(b) > maxAnnouncement {
		return a, fmt.Errorf("%w: %d bytes", errAnnouncement, len(b))
	}
	text, ok := strings.CutPrefix(string(b), "BT-SEARCH * HTTP/1.1\r\n")
	if !ok {
		return a, fmt.Errorf("%w: first line", errAnnouncement)
	}
	for n := 0; ; n++ {
		line, rest, ok := strings.Cut(text, "\r\n")
		if !ok || n > maxHeaders {
			return a, fmt.Errorf("%w: no end", errAnnouncement)
		}
		if text = rest; line == "" {
			break
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return a, fmt.Errorf("%w: header", errAnnouncement)
		}
		value = strings.TrimSpace(value)
		switch strings.ToLower(name) {
		case "port":
			port, err := strconv.ParseUint(value, 10, 16)
			if err != nil || port == 0 || a.port != 0 {
				return a, fmt.Errorf("%w: port", errAnnouncement)
			}
			a.port = uint16(port)
		case "infohash":
			tag, err := hex.DecodeString(value)
			if err != nil || len(tag) != tagSize {
				return a, fmt.Errorf("%w: infohash", errAnnouncement)
			}
			a.tags = append(a.tags, [tagSize]byte(tag))
		case "cookie":
			a.cookie = value
		}
	}
	if strings.Trim(text, "\r\n") != "" || a.port == 0 || len(a.tags) == 0 {
		return a, fmt.Errorf("%w: incomplete, or more than one", errAnnouncement)
	}
	return a, nil
}

// discover announces this node and listens for others until ctx ends.
func (g *Gossip) discover(ctx context.Context) {
	m, err := g.o.hooks.multicast()
	if err != nil {
		g.log.Warn("local discovery is off: this machine has no multicast", "err", err)
		return
	}
	tag := localTag(g.o.Key)
	mine := announcement{port: g.self.port, tags: [][tagSize]byte{tag}, cookie: rand.Text()}
	if g.self.fixed {
		mine.port = g.self.get().Addr.Port()
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer m.Close()
	wg.Go(func() { g.listenLocal(ctx, m, tag, mine.cookie) })
	alone := localFirst
	for {
		if err := m.Send(mine.encode()); err != nil {
			g.log.Debug("cannot announce this node locally", "err", err)
		}
		wait := localEvery
		if g.members.count() == 0 {
			wait, alone = alone, min(2*alone, localAlone)
		} else {
			alone = localFirst
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(jitter(wait)):
		}
	}
}

// listenLocal makes whoever announces itself as one of this cluster a target, until m is closed.
func (g *Gossip) listenLocal(ctx context.Context, m multicast, tag [tagSize]byte, cookie string) {
	limit := rate.NewLimiter(localRate, localBurst)
	buf := make([]byte, maxAnnouncement+1)
	for {
		n, from, err := m.ReadFrom(buf)
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(packetRetry):
			}
			continue
		}
		a, err := parseAnnouncement(buf[:n])
		if err != nil || a.cookie == cookie {
			continue
		}
		for _, t := range a.tags {
			if hmac.Equal(t[:], tag[:]) && limit.Allow() {
				at := netip.AddrPortFrom(from.Unmap(), a.port)
				if checkAddr(at, netip.Addr{}) == nil && !g.members.at(at) {
					g.peers.found(at)
				}
				break
			}
		}
	}
}

// multicastRefresh is how often the interfaces of the machine are looked up again.
const multicastRefresh = 30 * time.Second

// groupSocket is the multicast of the machine.
type groupSocket struct {
	conn  *ipv4.PacketConn
	group *net.UDPAddr

	mu     sync.Mutex // guards following
	looked time.Time
	joined map[int]bool // interfaces, by index
}

// openMulticast opens the group's port, which every program on the machine may share: Go sets SO_REUSEADDR for a group.
func openMulticast() (multicast, error) {
	c, err := net.ListenPacket("udp4", localGroup)
	if err != nil {
		return nil, err
	}
	group, err := net.ResolveUDPAddr("udp4", localGroup)
	if err != nil {
		c.Close()
		return nil, err
	}
	s := &groupSocket{conn: ipv4.NewPacketConn(c), group: group, joined: map[int]bool{}}
	// Other processes of this machine are to hear it, too.
	if err := s.conn.SetMulticastLoopback(true); err != nil {
		c.Close()
		return nil, err
	}
	s.refresh()
	return s, nil
}

// refresh joins the group on every interface that came up, and returns the indices of all that are up.
func (s *groupSocket) refresh() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.looked) > multicastRefresh || s.looked.IsZero() {
		s.looked = time.Now()
		ifs, err := net.Interfaces()
		if err == nil {
			up := map[int]bool{}
			for _, i := range ifs {
				// Loopback carries multicast on Linux though it has no flag for it.
				if i.Flags&net.FlagUp == 0 || i.Flags&(net.FlagMulticast|net.FlagLoopback) == 0 {
					continue
				}
				// In use: it was joined before it went down for a while.
				if err := s.conn.JoinGroup(&i, s.group); err == nil || errors.Is(err, syscall.EADDRINUSE) {
					up[i.Index] = true
				}
			}
			s.joined = up
		}
	}
	all := make([]int, 0, len(s.joined))
	for i := range s.joined {
		all = append(all, i)
	}
	return all
}

// Send succeeds when one interface took the message.
func (s *groupSocket) Send(b []byte) error {
	err := errors.New("no interface that is up has multicast")
	sent := false
	for _, i := range s.refresh() {
		_, e := s.conn.WriteTo(b, &ipv4.ControlMessage{IfIndex: i}, s.group)
		if e == nil {
			sent = true
		} else {
			err = e
		}
	}
	if sent {
		return nil
	}
	return err
}

func (s *groupSocket) ReadFrom(b []byte) (int, netip.Addr, error) {
	n, _, from, err := s.conn.ReadFrom(b)
	if err != nil {
		return 0, netip.Addr{}, err
	}
	a, ok := from.(*net.UDPAddr)
	if !ok {
		return 0, netip.Addr{}, fmt.Errorf("a message from %v", from)
	}
	return n, a.AddrPort().Addr().Unmap(), nil
}

func (s *groupSocket) Close() error { return s.conn.Close() }
