package cluster

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// sent is a reply after it went to another node.
func sent(t testing.TB, ans Reply, d *desk) (got Reply) {
	t.Helper()
	raw, err := json.Marshal(ans)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Count(raw, []byte(d.dg)) != 1 {
		t.Fatalf("the digest is in it more than once: %s", raw)
	}
	if err := decode(bytes.NewReader(raw), &got); err != nil {
		t.Fatal(err)
	}
	if err := got.validate(d.dg, d.size); err != nil {
		t.Fatal(err)
	}
	return got
}

// FuzzAnnounce gives a keeper whatever a member may send: after the check of the
// message it can do no harm to the book, and what the keeper answers passes the
// check of the one that asked.
func FuzzAnnounce(f *testing.F) {
	for _, a := range []Announcement{
		{Digest: digest.FromString("x"), Size: 9 << 20, Have: 4 << 20, Active: true, Registry: true, Held: Bitmap{1}, Claimed: Bitmap{2}, Want: 3},
		{Digest: digest.FromString("x"), Size: 9 << 20, Have: 9 << 20},
		{Digest: digest.FromString("y"), Size: 1 << 40, Active: true, Registry: true, Hungry: true, Want: 1 << 30, Doubt: []string{"a", "b"}},
		{Digest: digest.FromString("x"), Absent: true},
	} {
		raw, err := json.Marshal(announce{envelope{Port: 1, Zone: "z", Insist: true}, a})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte(`{"announcement":{"digest":"sha256:00","size":1e99}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var a announce
		if decode(bytes.NewReader(raw), &a) != nil || a.Announcement.validate() != nil {
			return
		}
		b, now := NewBook(1), time.Unix(1e9, 0)
		same := Announcement{Digest: a.Announcement.Digest, Size: a.Announcement.Size, Active: true, Registry: true, Want: 3}
		b.Announce(now, Member{ID: "a", Addr: addr}, same, false)
		for range 3 {
			ans := b.Announce(now, Member{ID: "b", Addr: addr}, a.Announcement, a.Insist)
			if err := ans.validate(a.Announcement.Digest, a.Announcement.Size); err != nil {
				t.Fatal(err)
			}
			now = now.Add(2 * time.Second)
		}
		check(t, b)
		b.Retain(func(string) bool { return false })
		check(t, b)
	})
}

// FuzzReply is what a keeper may answer.
func FuzzReply(f *testing.F) {
	d := digest.FromString("x")
	const size = 9 << 20
	good, err := json.Marshal(Reply{
		Digest: d, Granted: []int{0, 2}, Next: time.Second, Owners: []Member{{ID: "a", Addr: addr}},
		Peers: []Said{{Member{ID: "a", Addr: addr}, Announcement{Digest: d, Size: size, Have: 1, Held: Bitmap{1}}}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"digest":"` + string(d) + `","granted":[-1,3,99999999999],"next":-1}`))
	f.Add([]byte(`{"digest":"` + string(d) + `","elsewhere":{"ID":"","Addr":""},"peers":[{"Size":-1}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var ans Reply
		if decode(bytes.NewReader(raw), &ans) != nil || ans.validate(d, size) != nil {
			return
		}
		if ans.Next < announceEvery || ans.Next > HoldEvery || len(ans.Peers) > 2*maxNeighbours || len(ans.Owners) > 2*maxOwners {
			t.Fatalf("accepted: %+v", ans)
		}
		for _, s := range ans.Granted {
			if s < 0 || s >= Segments(size) {
				t.Fatalf("accepted segment %d", s)
			}
		}
		for _, p := range ans.Peers {
			if p.Digest != d || p.Size != size || p.Have < 0 || p.Have > size || !p.Addr.IsValid() || p.ID == "" {
				t.Fatalf("accepted peer %+v", p)
			}
		}
	})
}

// FuzzHolds is what a member may say that it holds.
func FuzzHolds(f *testing.F) {
	good, err := json.Marshal(holds{envelope{Port: 1}, []Hold{{digest.FromString("x"), 1}, {digest.FromString("x"), 2}, {digest.FromString("y"), 1 << 40}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"holds":[{"digest":"sha256:zz","size":-1},null,{}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var h holds
		if decode(bytes.NewReader(raw), &h) != nil || h.validate() != nil {
			return
		}
		b := NewBook(1)
		b.Hold(time.Unix(1e9, 0), Member{ID: "a", Addr: addr}, h.Holds)
		check(t, b)
	})
}

// FuzzStatements is both forms in which statements come: an answer, and the header
// of a ranged read.
func FuzzStatements(f *testing.F) {
	s, err := trust.NewSecret().Identity()
	if err != nil {
		f.Fatal(err)
	}
	d := digest.FromString("x")
	st := Sign(s, d, 1<<20, []int{0, 2}, []PieceSum{{1}, {2}})
	good, err := json.Marshal([]Statement{st})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`[{"pieces":[1,1],"sums":"AAAA"}]`))
	f.Add([]byte(`[{"pieces":[-1],"sums":"` + base64.StdEncoding.EncodeToString(make([]byte, 32)) + `"},null]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var said []Statement
		answer := decode(bytes.NewReader(raw), &said)
		if answer == nil {
			answer = validStatements(said)
		}
		inHeader, header := statementsIn(base64.StdEncoding.EncodeToString(raw))
		if len(raw) > 0 && (answer == nil) != (header == nil) {
			t.Fatalf("as an answer: %v; in a header: %v", answer, header)
		}
		if answer != nil {
			return
		}
		for i := range said {
			x := &said[i]
			if len(x.Sums) != len(x.Pieces) || len(x.Pieces) > maxPieces || len(inHeader[i].Sums) != len(x.Sums) {
				t.Fatalf("accepted %d pieces, %d sums", len(x.Pieces), len(x.Sums))
			}
			if x.Verify(d, 1<<20) && x.Verify(d, 1<<20+1) {
				t.Fatalf("%s is believed of blobs of two sizes", x.By)
			}
		}
	})
}

// FuzzStatementsHeader is what is not even base64.
func FuzzStatementsHeader(f *testing.F) {
	f.Add("")
	f.Add("e30=")
	f.Add("W3t9XQ==")
	f.Fuzz(func(t *testing.T, header string) {
		said, err := statementsIn(header)
		if err == nil && len(said) > maxStatements {
			t.Fatalf("%d statements", len(said))
		}
	})
}

// FuzzStatementsQuery is a question for statements.
func FuzzStatementsQuery(f *testing.F) {
	good, err := json.Marshal(statementsQuery{digest.FromString("x"), 1 << 20, []int{0, 3}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"digest":"sha512:00","size":-1,"pieces":[-1,1e9]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var q statementsQuery
		if decode(bytes.NewReader(raw), &q) != nil || q.validate() != nil {
			return
		}
		if len(q.Pieces) > maxPieces || q.Size < 0 || q.Size > maxBlobSize {
			t.Fatalf("accepted %+v", q)
		}
		for _, i := range q.Pieces {
			if i < 0 || int64(i) >= q.Size {
				t.Fatalf("accepted piece %d of %d bytes", i, q.Size)
			}
		}
	})
}
