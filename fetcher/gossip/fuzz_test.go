package gossip

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

func FuzzMeta(f *testing.F) {
	secret := trust.NewSecret()
	id, err := secret.Identity()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encodeMeta(id, Node{Addr: netip.MustParseAddrPort("10.0.0.1:7000"), Zone: "a/b", Origin: true}, 1))
	f.Add(encodeMeta(id, Node{Addr: netip.MustParseAddrPort("[2001:db8::1]:7000"), Ephemeral: true}, 1<<63))
	f.Add([]byte{metaVersion})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMeta(b)
		if err != nil {
			if !errors.Is(err, errMeta) {
				t.Errorf("error %v", err)
			}
			return
		}
		// One spelling: what was read is what would be written, but for who signs.
		n := encodeMeta(id, m.node, m.seq)
		if tail := trust.PublicKeySize + trust.SignatureSize; !bytes.Equal(n[:len(n)-tail], b[:len(b)-tail]) {
			t.Errorf("%x is read as %x", b, n)
		}
		if got, err := verifyMeta(id.ID(), b); err == nil && !bytes.Equal(got.key, id.PublicKey()) {
			t.Error("verified with another key")
		}
	})
}

func FuzzPacket(f *testing.F) {
	key := bytes.Repeat([]byte{7}, 32)
	s, o := newSealer(key, nodeID{1}), newOpener(key, nodeID{2})
	f.Add(s.seal(nodeID{2}, []byte("hello"))[:headerSize])
	f.Add(make([]byte, sealOverhead))
	f.Fuzz(func(t *testing.T, b []byte) {
		if msg, ok := o.open(b, netip.AddrPort{}); ok {
			t.Errorf("opened %q", msg)
		}
		plainPacket(b)
	})
}

func FuzzStream(f *testing.F) {
	f.Add([]byte("\x06\x83\xa5Nodes\x00\xacUserStateLen\x00\xa4Join\xc3"), false)
	f.Add([]byte("\x06\x83\xa5Nodes\xcd\x01\x00\xacUserStateLen\xd3\x00\x00\x00\x00\x00\x00\x00\x00\xa4Join\xc2"), true)
	f.Add([]byte{msgAck}, true)
	f.Fuzz(func(t *testing.T, b []byte, answer bool) {
		r := bytes.NewReader(b)
		entries, err := checkStream(r, answer)
		if entries < 0 || entries > 2*maxMembers {
			t.Errorf("%d entries", entries)
		}
		if read := len(b) - r.Len(); read > 64 {
			t.Errorf("read %d bytes of a header", read)
		}
		if err == nil && len(b) == 0 {
			t.Error("an empty stream is good")
		}
	})
}

func FuzzBroadcast(f *testing.F) {
	f.Add(append([]byte{castVersion}, make([]byte, castOverhead)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, text, body, sig, ok := parseCast(b)
		if ok && (len(body) == 0 || len(body) > MaxMessage || len(sig) != trust.SignatureSize || len(text)+len(sig) != len(b)) {
			t.Errorf("body %d, text %d, signature %d of %d bytes", len(body), len(text), len(sig), len(b))
		}
	})
}
