package gossip

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// memberlist's message types (its net.go) that matter here: the first byte of every packet and stream.
const (
	msgPing      = 0
	msgAck       = 2
	msgPushPull  = 6
	msgCompress  = 9
	msgCRC       = 12
	msgErr       = 13
	crcHeaderLen = 5
)

const (
	// maxStream bounds what one stream may bring, in bytes: a list of maxMembers has 400 bytes each at most, 8 MB.
	maxStream = 12 << 20
	// maxHeld bounds what the streams of others bring together, in bytes, while they last: a thousand members can send a
	// list of a thousand members a hundred at a time.
	maxHeld = 64 << 20
	// entrySize is what memberlist reserves for each entry that a list announces, in bytes.
	entrySize = 128
)

var errStream = errors.New("malformed membership stream")

// stream is a connection of another member as memberlist reads it: what it would take without a bound is refused first. Its
// header claims a number of members that memberlist makes room for (112 bytes each, up to a million) before it reads them,
// and compressed data could be 40 MiB when unpacked.
type stream struct {
	net.Conn
	peer   string // node ID by the certificate
	answer bool   // this node dialled
	done   func() // tells the transport, once
	once   sync.Once

	head bytes.Buffer  // what was looked at and memberlist has not read yet
	body *bufio.Reader // what follows; nil until the first Read
	left int64         // of maxStream

	total *atomic.Int64 // what the streams of others hold; nil for one that this node dialled

	mu    sync.Mutex // guards following
	held  int64      // this one's part of total
	ended bool
}

// Read is called by one goroutine at a time, as memberlist does.
func (s *stream) Read(p []byte) (int, error) {
	if s.body == nil {
		s.body, s.left = bufio.NewReaderSize(s.Conn, 4096), maxStream
		entries, err := checkStream(io.TeeReader(s.body, &s.head), s.answer)
		if err == nil {
			err = s.hold(int64(entries) * entrySize)
		}
		if err != nil {
			return 0, err
		}
	}
	if s.left <= 0 {
		return 0, fmt.Errorf("%w: more than %d bytes", errStream, maxStream)
	}
	p = p[:min(int64(len(p)), s.left)]
	var n int
	var err error
	if s.head.Len() > 0 {
		n, err = s.head.Read(p)
	} else {
		n, err = s.body.Read(p)
	}
	s.left -= int64(n)
	if e := s.hold(int64(n)); e != nil {
		return 0, e
	}
	return n, err
}

// hold counts what memberlist keeps of this stream until it is closed.
func (s *stream) hold(n int64) error {
	if s.total == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return net.ErrClosed
	}
	s.held += n
	if s.total.Add(n) > maxHeld {
		return fmt.Errorf("%w: too many large ones at once", errStream)
	}
	return nil
}

func (s *stream) Close() error {
	err := net.ErrClosed
	s.once.Do(func() {
		err = s.Conn.Close()
		s.mu.Lock()
		s.ended = true
		if s.total != nil {
			s.total.Add(-s.held)
		}
		s.mu.Unlock()
		s.done()
	})
	return err
}

// checkStream reads the beginning of a stream, the type and for a list its header. It returns the number of entries that the
// list announces, or says what is wrong.
func checkStream(r io.Reader, answer bool) (entries int, err error) {
	var kind [1]byte
	if _, err := io.ReadFull(r, kind[:]); err != nil {
		return 0, err
	}
	switch {
	case kind[0] == msgPushPull:
		return checkListHeader(r)
	case !answer && kind[0] == msgPing, answer && (kind[0] == msgAck || kind[0] == msgErr):
		return 0, nil
	}
	return 0, fmt.Errorf("%w: type %d", errStream, kind[0])
}

// checkListHeader reads the header of a list: a msgpack map of Nodes and UserStateLen (numbers) and Join (boolean).
func checkListHeader(r io.Reader) (entries int, err error) {
	var b [9]byte
	next := func(n int) ([]byte, error) {
		_, err := io.ReadFull(r, b[:n])
		return b[:n], err
	}
	head, err := next(1)
	if err != nil {
		return 0, err
	}
	fields := int(head[0] &^ 0x80)
	if head[0]&0xf0 != 0x80 || fields > 3 {
		return 0, fmt.Errorf("%w: header", errStream)
	}
	seen := map[string]bool{}
	for range fields {
		head, err := next(1)
		if err != nil {
			return 0, err
		}
		size := int(head[0] & 0x1f)
		if head[0]&0xe0 != 0xa0 || size > len("UserStateLen") {
			return 0, fmt.Errorf("%w: header", errStream)
		}
		key := make([]byte, size)
		if _, err := io.ReadFull(r, key); err != nil {
			return 0, err
		}
		if seen[string(key)] {
			return 0, fmt.Errorf("%w: header says %.12q twice", errStream, key)
		}
		seen[string(key)] = true
		if head, err = next(1); err != nil {
			return 0, err
		}
		kind := head[0]
		var value uint64
		switch {
		case kind < 0x80:
			value = uint64(kind)
		case kind >= 0xcc && kind <= 0xd3: // uint8 … uint64, int8 … int64: a negative one is a large value here
			n := 1 << ((kind - 0xcc) & 3)
			if head, err = next(n); err != nil {
				return 0, err
			}
			var full [8]byte
			copy(full[8-n:], head)
			value = binary.BigEndian.Uint64(full[:])
		case kind != 0xc2 && kind != 0xc3:
			return 0, fmt.Errorf("%w: header", errStream)
		}
		isBool := kind == 0xc2 || kind == 0xc3
		switch string(key) {
		case "Nodes":
			// Twice the bound: members that died lately are in it, too.
			if isBool || value > 2*maxMembers {
				return 0, fmt.Errorf("%w: %d members", errStream, value)
			}
			entries = int(value)
		case "UserStateLen":
			if isBool || value != 0 {
				return 0, fmt.Errorf("%w: %d bytes of state", errStream, value)
			}
		case "Join":
			if !isBool {
				return 0, fmt.Errorf("%w: header", errStream)
			}
		default:
			return 0, fmt.Errorf("%w: header has %.12q", errStream, key)
		}
	}
	return entries, nil
}

// plainPacket reports whether a packet is one that memberlist may have: not compressed, which this package never sends.
func plainPacket(b []byte) bool {
	if len(b) > crcHeaderLen && b[0] == msgCRC {
		b = b[crcHeaderLen:]
	}
	return len(b) > 0 && b[0] != msgCompress
}
