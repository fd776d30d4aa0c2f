package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// clerk is an Errands that says what it is told.
type clerk struct {
	resolve func(ctx context.Context, from string, q Question) Answer
	fetch   func(ctx context.Context, from string, e Errand, begun func()) error
}

func (c *clerk) Resolve(ctx context.Context, from string, q Question) Answer {
	return c.resolve(ctx, from, q)
}

func (c *clerk) RunErrand(ctx context.Context, from string, e Errand, begun func()) error {
	return c.fetch(ctx, from, e, begun)
}

var (
	body     = []byte(`{"schemaVersion":2}`)
	question = Question{Ref: "quay.example/team/app:1", Login: &Login{Username: "ada", Secret: "secret"}}
	byDigest = Question{Ref: "quay.example/team/app@" + string(digest.FromBytes(body)), Digest: digest.FromBytes(body)}
)

func good() Answer {
	return Answer{MediaType: "application/vnd.oci.image.manifest.v1+json", Digest: digest.FromBytes(body), Body: body, Source: FromRegistry, Access: AccessLogin, Age: 3}
}

// endpoint serves the errands of one member by mutual TLS, and a way to ask it.
type endpoint struct {
	asker  *Cluster
	member Member
}

// newEndpoint serves h, or the endpoints over e when h is nil.
func newEndpoint(t *testing.T, e Errands, h http.Handler) endpoint {
	t.Helper()
	s := trust.NewSecret()
	id, err := s.Identity()
	if err != nil {
		t.Fatal(err)
	}
	l, err := trust.Listen("127.0.0.1", trust.PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	if h == nil {
		mux := http.NewServeMux()
		(&Cluster{o: Options{PeerID: trust.PeerID, Errands: e}}).serveErrands(mux)
		h = mux
	}
	srv := &http.Server{Handler: h}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(l.HTTP()) }()
	mine, err := s.Identity()
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: mine.Client(trust.ProtoHTTP1)}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		_ = srv.Close()
		_ = l.Close()
		<-served
	})
	return endpoint{&Cluster{o: Options{PeerID: trust.PeerID}, client: client}, Member{ID: id.ID(), Addr: l.Addr()}}
}

func TestResolve(t *testing.T) {
	var got Question
	e := newEndpoint(t, &clerk{resolve: func(_ context.Context, from string, q Question) Answer {
		if from == "" {
			t.Error("nobody asks")
		}
		got = q
		return good()
	}}, nil)
	a, err := e.asker.Resolve(t.Context(), e.member, question)
	if err != nil || !bytes.Equal(a.Body, body) || a.Digest != digest.FromBytes(body) || a.Source != FromRegistry || a.Access != AccessLogin || a.Age != 3 {
		t.Errorf("%+v, %v", a, err)
	}
	if got.Ref != question.Ref || *got.Login != *question.Login {
		t.Errorf("the member was asked %+v", got)
	}
	// The connection is good for more: no deadline stays behind.
	if _, err := e.asker.Resolve(t.Context(), e.member, byDigest); err == nil {
		t.Error("an answer that names a login was taken for a question without one")
	}
}

// Whatever a member sends, only an answer whose bytes have the digest it names, and the digest that was asked for, is taken.
func TestHostileAnswers(t *testing.T) {
	with := func(f func(*Answer)) Answer { a := good(); f(&a); return a }
	for name, test := range map[string]struct {
		q Question
		a any
	}{
		"another body":       {question, with(func(a *Answer) { a.Body = []byte(`{"schemaVersion":3}`) })},
		"no body":            {question, with(func(a *Answer) { a.Body = nil })},
		"another digest":     {Question{Ref: "quay.example/team/app@" + string(digest.FromString("other"))}, with(func(a *Answer) { a.Access = "" })},
		"unknown algorithm":  {question, with(func(a *Answer) { a.Digest = "md5:900150983cd24fb0d6963f7d28e17f72" })},
		"long media type":    {question, with(func(a *Answer) { a.MediaType = strings.Repeat("a", maxMediaType+1) })},
		"body too large":     {question, with(func(a *Answer) { a.Body = make([]byte, maxManifest+1); a.Digest = digest.FromBytes(a.Body) })},
		"answer too large":   {question, map[string]string{"padding": strings.Repeat("a", maxManifestAnswer)}},
		"unknown source":     {question, with(func(a *Answer) { a.Source = "hearsay" })},
		"unknown access":     {question, with(func(a *Answer) { a.Access = "root" })},
		"seen in the future": {question, with(func(a *Answer) { a.Age = -1 })},
		"seen long ago":      {question, with(func(a *Answer) { a.Age = 1 << 60 })},
		"refusal of no kind": {question, Answer{Refusal: &Refusal{Message: "no"}}},
		"endless refusal":    {question, Answer{Refusal: &Refusal{Kind: "denied", Message: strings.Repeat("a", maxSentence+1)}}},
		"no answer":          {question, nil},
		"not JSON":           {question, json.RawMessage(`{`)},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEndpoint(t, nil, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				if raw, ok := test.a.(json.RawMessage); ok {
					_, _ = w.Write(raw)
					return
				}
				respond(w, test.a)
			}))
			if a, err := e.asker.Resolve(t.Context(), e.member, test.q); err == nil {
				t.Errorf("was taken: %+v", a)
			}
		})
	}
}

func TestRefusalIsPrintable(t *testing.T) {
	e := newEndpoint(t, &clerk{resolve: func(context.Context, string, Question) Answer {
		return Answer{Body: body, Refusal: &Refusal{Kind: "denied", Message: "no\x1b[2J\nway"}}
	}}, nil)
	a, err := e.asker.Resolve(t.Context(), e.member, question)
	if err != nil || a.Refusal == nil || a.Body != nil || a.Refusal.Message != "no [2J way" {
		t.Errorf("%+v, %v", a, err)
	}
	long := NewRefusal("denied", errors.New(strings.Repeat("ä", maxSentence)))
	if err := long.validate(); err != nil {
		t.Error(err)
	}
}

// Another node at a member's address is not believed, whatever it says.
func TestAnotherNodeAnswers(t *testing.T) {
	e := newEndpoint(t, &clerk{resolve: func(context.Context, string, Question) Answer { return good() }}, nil)
	e.member.ID = strings.Repeat("0", 32)
	if _, err := e.asker.Resolve(t.Context(), e.member, question); err == nil {
		t.Error("believed")
	}
}

// A member that does not answer costs its caller what the caller gives it.
func TestSlowMember(t *testing.T) {
	e := newEndpoint(t, &clerk{resolve: func(ctx context.Context, _ string, _ Question) Answer {
		<-ctx.Done() // also ends when who asked has gone
		return good()
	}}, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := e.asker.Resolve(ctx, e.member, question); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// No member gets more than its places, and others still get theirs; who does nothing for others says so.
func TestPlacesAreBounded(t *testing.T) {
	entered := make(chan struct{}, questions)
	release := make(chan struct{})
	e := newEndpoint(t, &clerk{resolve: func(context.Context, string, Question) Answer {
		entered <- struct{}{}
		<-release
		return good()
	}}, nil)
	var wg sync.WaitGroup
	for range questionsEach {
		wg.Go(func() {
			if _, err := e.asker.Resolve(t.Context(), e.member, question); err != nil {
				t.Error(err)
			}
		})
	}
	for range questionsEach {
		<-entered
	}
	if _, err := e.asker.Resolve(t.Context(), e.member, question); !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	close(release)
	wg.Wait()
	if _, err := e.asker.Resolve(t.Context(), e.member, question); err != nil {
		t.Errorf("a place was not given back: %v", err)
	}
	g := &gate{most: 3, each: 2}
	for _, test := range []struct {
		id string
		ok bool
	}{{"a", true}, {"a", true}, {"a", false}, {"b", true}, {"b", false}, {"c", false}} {
		if _, ok := g.enter(test.id); ok != test.ok {
			t.Errorf("%s: %v", test.id, ok)
		}
	}
	none := newEndpoint(t, nil, nil)
	if _, err := none.asker.Resolve(t.Context(), none.member, question); !errors.Is(err, ErrNoErrands) {
		t.Error(err)
	}
	if err := none.asker.RunErrand(t.Context(), none.member, errandOf(1), nil); !errors.Is(err, ErrNoErrands) {
		t.Error(err)
	}
}

func errandOf(size int64) Errand {
	return Errand{Ref: "quay.example/team/app", Digest: digest.FromString("layer"), Size: size}
}

func TestErrand(t *testing.T) {
	goOn := make(chan struct{})
	e := newEndpoint(t, &clerk{fetch: func(ctx context.Context, _ string, e Errand, begun func()) error {
		switch e.Size {
		case 1: // done at once
			return nil
		case 2: // begun, then done
			begun()
			<-goOn
			return nil
		case 3: // until nobody wants it
			begun()
			<-ctx.Done()
			close(goOn)
			return ctx.Err()
		}
		return NewRefusal("denied", errors.New("the registry says no"))
	}}, nil)
	if err := e.asker.RunErrand(t.Context(), e.member, errandOf(1), nil); err != nil {
		t.Error(err)
	}
	if err := e.asker.RunErrand(t.Context(), e.member, errandOf(2), func() { close(goOn) }); err != nil {
		t.Error(err)
	}
	var refusal *Refusal
	if err := e.asker.RunErrand(t.Context(), e.member, errandOf(4), nil); !errors.As(err, &refusal) || refusal.Kind != "denied" {
		t.Error(err)
	}
	goOn = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	if err := e.asker.RunErrand(ctx, e.member, errandOf(3), cancel); err == nil {
		t.Error("an errand that nobody wants any more went well")
	}
	select {
	case <-goOn:
	case <-time.After(5 * time.Second):
		t.Error("the member goes on though who asked has gone")
	}
}

// A member may cut an errand off, or talk nonsense; it never looks done.
func TestHostileErrand(t *testing.T) {
	for name, says := range map[string]string{
		"nothing":       "",
		"cut":           `{"state":"fetching"}`,
		"unknown state": `{"state":"almost"}`,
		"nonsense":      `complete`,
		"long refusal":  `{"refusal":{"kind":"` + strings.Repeat("a", maxKind+1) + `"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			e := newEndpoint(t, nil, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, says) }))
			var refusal *Refusal
			if err := e.asker.RunErrand(t.Context(), e.member, errandOf(1), nil); err == nil || errors.As(err, &refusal) {
				t.Errorf("taken: %v", err)
			}
		})
	}
}

// What does not come by mutual TLS, or is malformed, is refused before anything is asked.
func TestMalformedQuestions(t *testing.T) {
	e := newEndpoint(t, &clerk{resolve: func(context.Context, string, Question) Answer {
		t.Error("was asked")
		return good()
	}}, nil)
	for _, q := range []Question{
		{},
		{Ref: "app:1"},              // not in full
		{Ref: "team/app"},           // Docker Hub's, not in full
		{Ref: "quay.example/app"},   // neither tag nor digest
		{Ref: "quay.example/App:1"}, // no name
		{Ref: "http://169.254.169.254/latest:1"},
		{Ref: "quay.example/../../v1/secrets:1"},
		{Ref: "quay.example/" + strings.Repeat("a/", 400) + "a:1"},
		{Ref: question.Ref, Digest: digest.FromBytes(body)}, // the name is of something else
		{Ref: question.Ref, Login: &Login{}},
		{Ref: question.Ref, Login: &Login{Secret: strings.Repeat("a", maxLogin+1)}},
	} {
		if _, err := e.asker.Resolve(t.Context(), e.member, q); err == nil || !strings.Contains(err.Error(), "400") {
			t.Errorf("%+v: %v", q, err)
		}
	}
	mux := http.NewServeMux()
	(&Cluster{o: Options{PeerID: trust.PeerID, Errands: &clerk{}}}).serveErrands(mux)
	for _, path := range []string{"/quay/v1/resolve", "/quay/v1/fetch"} {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, strings.NewReader("{}")))
		if w.Code != http.StatusForbidden {
			t.Errorf("%s without TLS: %d", path, w.Code)
		}
	}
}

func FuzzQuestion(f *testing.F) {
	for _, v := range []any{question, byDigest, errandOf(5), Question{Ref: "docker.io/library/debian:12", Node: true, Offline: true}} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var q Question
		if decodeWithin(bytes.NewReader(b), maxQuestion, &q) == nil && q.validate() == nil {
			ref, err := checkRef(q.Ref)
			if err != nil || ref.String() != q.Ref {
				t.Errorf("%q reads as %q, %v", q.Ref, ref, err)
			}
		}
		var e Errand
		if decodeWithin(bytes.NewReader(b), maxQuestion, &e) == nil && e.validate() == nil && (e.Size < 0 || e.Digest.Validate() != nil) {
			t.Errorf("%+v", e)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	for _, a := range []Answer{good(), {Refusal: NewRefusal("denied", errors.New("no"))}, {Digest: digest.FromBytes(body), Body: body, Source: FromCache, Age: 99}} {
		b, err := json.Marshal(a)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var a Answer
		if decodeWithin(bytes.NewReader(b), maxManifestAnswer, &a) != nil || a.validate(&byDigest) != nil || a.Refusal != nil {
			return
		}
		if a.Digest != byDigest.Digest || !bytes.Equal(a.Body, body) {
			t.Errorf("%s has the body %q", a.Digest, a.Body)
		}
	})
}
