package fetcher

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

// A member connects to nothing of its own machine because somebody asks, but for registries that it was told are there.
func TestMemberDoesNotLookInward(t *testing.T) {
	r := newTeam(t)
	r.public = true
	s := secret()
	member := bastionNode(t, s, Options{Behalf: &origin.Options{HostDirs: []string{}}})
	bastion := bastionNode(t, s, Options{Reach: ThroughMembers, Peers: []string{member.Addr().String()}})
	_, err := bastion.Image(within(t, 20*time.Second), r.ref(t, ":1"), ImageOptions{Origin: client(t, "", "")})
	if !errors.Is(err, origin.ErrUnavailable) || !strings.Contains(err.Error(), "on behalf of others") {
		t.Error(err)
	}
	if len(r.requests) != 0 {
		t.Errorf("it was asked %v", r.requests)
	}
	e := cluster.Errand{Ref: r.ref(t, "").String(), Digest: digest.FromBytes(r.layer), Size: int64(len(r.layer))}
	var refusal *cluster.Refusal
	if err := (behalf{member.Fetcher}).RunErrand(t.Context(), "somebody", e, func() {}); !errors.As(err, &refusal) || len(r.requests) != 0 {
		t.Errorf("%v, %v", err, r.requests)
	}
}

// An errand with a credential that the registry does not accept, or for another size, changes nothing here.
func TestErrandIsChecked(t *testing.T) {
	r := newTeam(t)
	member, _ := gateway(t, r)
	e := cluster.Errand{Ref: r.ref(t, "").String(), Digest: digest.FromBytes(r.layer), Size: int64(len(r.layer))}
	begun := func() { t.Error("it was begun") }
	for _, test := range []struct {
		login *cluster.Login
		size  int64
		kind  string
	}{
		{nil, e.Size, "denied"},
		{&cluster.Login{Username: "mallory", Secret: "guess"}, e.Size, "denied"},
		{&cluster.Login{Username: "alice", Secret: "sesame"}, e.Size + 1, "mismatch"},
	} {
		e.Login, e.Size = test.login, test.size
		var refusal *cluster.Refusal
		if err := (behalf{member.Fetcher}).RunErrand(within(t, 10*time.Second), "somebody", e, begun); !errors.As(err, &refusal) || refusal.Kind != test.kind {
			t.Errorf("%+v: %v", test, err)
		}
	}
	nothingIn(t, member)
}
