package cluster

import (
	"fmt"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestPace(t *testing.T) {
	now := time.Unix(1e9, 0)
	for _, c := range []struct {
		name  string
		since time.Duration
		p     Pace
		want  int
		due   bool
	}{
		{"just told", 100 * time.Millisecond, Pace{Next: time.Second}, 0, false},
		{"interval over", 1001 * time.Millisecond, Pace{Next: time.Second}, 0, true},
		{"keeper wants it rarer", 5 * time.Second, Pace{Next: 10 * time.Second}, 0, false},
		{"could take a segment", 0, Pace{Next: 10 * time.Second}, 1, true},
		{"was refused one", 200 * time.Millisecond, Pace{Next: time.Second, Refused: true}, 1, false},
		{"asks again", 260 * time.Millisecond, Pace{Next: time.Second, Refused: true}, 1, true},
		{"asks again, in a crowd", 2 * time.Second, Pace{Next: 10 * time.Second, Refused: true}, 1, false},
	} {
		c.p.Asked = now.Add(-c.since)
		if got := c.p.Due(now, c.want); got != c.due {
			t.Errorf("%s: due is %v", c.name, got)
		}
	}
	var p Pace
	p.Heard(Reply{Next: time.Minute}, 2)
	if p.Next != time.Minute || !p.Refused {
		t.Errorf("%+v", p)
	}
	if p.Heard(Reply{Granted: []int{1}}, 2); p.Refused {
		t.Error("a loan is no refusal")
	}
}

// Those that the keeper named take turns, one by one, the others come last.
func TestInTurnOfOwners(t *testing.T) {
	d := digest.FromString("x")
	var owners []Member
	for i := range 4 {
		owners = append(owners, Member{ID: fmt.Sprint("n", i)})
	}
	for k, want := range []int{0, 1, 2, 3, 4, 104} {
		idle := time.Duration(k) * takeover // idleBefore is one of them
		n := 0
		for i := range 104 {
			if InTurn(d, 7, fmt.Sprint("n", i), owners, 1000, idle) {
				n++
			}
		}
		if n != want {
			t.Errorf("after %v %d nodes ask the registry, want %d", idle, n, want)
		}
	}
}

// Without a keeper's word a crowd asks for about one copy every few seconds.
func TestInTurnOfACrowd(t *testing.T) {
	d := digest.FromString("x")
	const nodes, segments = 2000, 50
	count := func(idle time.Duration) (copies float64) {
		for i := range nodes {
			id := fmt.Sprint("n", i)
			for s := range segments {
				if InTurn(d, s, id, nil, nodes, idle) {
					copies += 1. / segments
				}
			}
		}
		return copies
	}
	for _, c := range []struct {
		idle     time.Duration
		min, max float64
	}{{idleBefore - 1, 0, 0}, {idleBefore, 0.5, 1.5}, {idleBefore + takeover, 1.3, 2.7}, {aloneAfter, nodes, nodes}} {
		if n := count(c.idle); n < c.min*0.999 || n > c.max*1.001 {
			t.Errorf("after %v %.2f copies are asked for", c.idle, n)
		}
	}
	for i := range fewMembers {
		if !InTurn(d, 0, fmt.Sprint("n", i), nil, fewMembers, idleBefore) {
			t.Error("one of few does not ask the registry")
		}
	}
}

func TestBusy(t *testing.T) {
	d := newDesk(t, 4)
	if d.book.Busy(d.now, d.dg) != 0 {
		t.Error("an unknown blob is busy")
	}
	d.book.Hold(d.now, d.member("seed", ""), []Hold{{d.dg, d.size}})
	d.pass(time.Hour)
	for i := range 6 {
		d.says("a", part{})
		if got := d.book.Busy(d.now, d.dg); got != time.Duration(i)*time.Second {
			t.Errorf("busy for %v after %d s", got, i)
		}
		d.pass(time.Second)
	}
	d.pass(time.Minute)
	if got := d.book.Busy(d.now, d.dg); got != 0 {
		t.Errorf("busy for %v, and nobody came for a minute", got)
	}
}

// A reply leaves out what its reader knows, and is whole again once it was checked.
func TestReplyIsBrief(t *testing.T) {
	d := newDesk(t, 4)
	d.says("a", part{held: []int{1}})
	ans := d.says("b", part{})
	said := ans.Peers[0]
	got := sent(t, ans, d)
	if p := got.Peers[0]; p.Digest != d.dg || p.Size != d.size || p.Have != said.Have || p.Complete() || ans.Peers[0].Digest != d.dg {
		t.Errorf("%+v", got.Peers[0])
	}
}
